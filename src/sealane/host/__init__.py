"""The agent of one host: its REST interface, its journal, its peers, its VMs and its migrations."""
