"""Products of rows in bfloat16 limbs, at the pace of a processor's matrix unit."""
