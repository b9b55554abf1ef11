"""Where the attack lab's experiments are made: simulated hosts, a guest with secrets, and the attacker of `sealane.lab`."""
