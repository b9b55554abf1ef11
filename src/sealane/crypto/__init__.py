"""The only room that imports pyca/cryptography and pyOpenSSL."""
