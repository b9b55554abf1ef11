"""Receipts: what each migration leaves behind, signed, in a chain (docs/receipts.md).

statement.py   what a receipt says: an in-toto statement, built from the journal's snapshot of a migration
chain.py       writes them, one after the other, each naming the digest of the one before
verify.py      looks at a directory of them without an agent and tells what is missing, changed or out of place
"""
