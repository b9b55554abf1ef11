"""The libvirt driver: domains found and described, and libvirt's own migration protocol, filtered."""
