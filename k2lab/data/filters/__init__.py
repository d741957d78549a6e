"""Filters: one slot file each, streams of records that log what they drop or change (see k2lab.data.filtering)."""
