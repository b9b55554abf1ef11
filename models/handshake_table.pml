/*
 * Drawn from sealane.session.attestation by tests/models/table.py; do not edit.
 * ROLE_after(state, input) is the state that follows, or 0 where the code's table has no such step.
 */
mtype:end = { SOURCE, DESTINATION };
mtype:state = { CHALLENGED, QUOTING, QUOTING_PEER_SHOWN, SHOWN, BOTH_SHOWN, M1_SENT, M2_SENT, M3_SENT, ATTESTED };
mtype:input = { PEER_CHALLENGED, EVIDENCE_MADE, PEER_SHOWED, M1, M2, M3, M4 };

#define source_after(state, input) \
	((state) == CHALLENGED && (input) == PEER_CHALLENGED -> QUOTING : \
	((state) == QUOTING && (input) == EVIDENCE_MADE -> SHOWN : \
	((state) == QUOTING && (input) == PEER_SHOWED -> QUOTING_PEER_SHOWN : \
	((state) == QUOTING_PEER_SHOWN && (input) == EVIDENCE_MADE -> M1_SENT : \
	((state) == SHOWN && (input) == PEER_SHOWED -> M1_SENT : \
	((state) == M1_SENT && (input) == M2 -> M3_SENT : \
	((state) == M3_SENT && (input) == M4 -> ATTESTED : \
	0)))))))

#define destination_after(state, input) \
	((state) == CHALLENGED && (input) == PEER_CHALLENGED -> QUOTING : \
	((state) == QUOTING && (input) == EVIDENCE_MADE -> SHOWN : \
	((state) == QUOTING && (input) == PEER_SHOWED -> QUOTING_PEER_SHOWN : \
	((state) == QUOTING_PEER_SHOWN && (input) == EVIDENCE_MADE -> BOTH_SHOWN : \
	((state) == SHOWN && (input) == PEER_SHOWED -> BOTH_SHOWN : \
	((state) == BOTH_SHOWN && (input) == M1 -> M2_SENT : \
	((state) == M2_SENT && (input) == M3 -> ATTESTED : \
	0)))))))
