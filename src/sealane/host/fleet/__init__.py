"""A fleet's CA: the CA's host (`registry`, `office`), a host that belongs to one (`membership`, `renewing`), and what either
knows of other hosts' hardware (`known`)."""
