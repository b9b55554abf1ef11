"""The verifier (RFC 9334): evidence in, a verdict in words out. No I/O, no clock of its own.

reading  kinds                  any bytes -> one kind of evidence, or EvidenceError
tpm  eventlog  ima              TPM 2.0 quotes and the logs behind their PCRs
quotes  collateral  dcap        SGX and TDX quotes (DCAP)
snp                             SEV-SNP reports
chain  roots                    certificates up to pinned roots
reference                       what is expected: reference values, hosts, policy
reasons  verdict                the catalogue of reasons, and what they add up to
appraise                        all of it together
"""
