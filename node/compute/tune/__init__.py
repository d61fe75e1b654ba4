"""Tuning: an adapter trained from feature maps, to the bit the same however often it is interrupted."""
