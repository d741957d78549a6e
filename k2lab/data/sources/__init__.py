"""Sources: one slot file each, yielding records with stable keys and a fingerprint of their content (see k2lab.data.records)."""
