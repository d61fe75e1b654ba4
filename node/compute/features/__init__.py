"""Feature maps: what the frozen model computes once and nobody computes again.

codec ─▶ key ─▶ store ─▶ maps
  ├─ codec   rows as bytes (raw, 8 bit, 4 bit) with a certificate of the error, and which one to take
  ├─ key     what a block of features is called: everything it depends on, and never an adapter
  ├─ packs   many blocks in one file, each with its digest
  ├─ disk    the packs of a directory: what lies where, what goes first
  ├─ store   memory before disk, both bounded: what saves most seconds per byte stays
  ├─ shape   passes of one shape, so that a row's bits do not depend on its neighbours
  └─ maps    texts in, features out: fetched or computed, the same to the last bit
"""
