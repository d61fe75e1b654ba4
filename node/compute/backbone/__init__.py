"""The frozen model: weights in a chosen precision, its states, and one pass for any mix of sequences.

load ─▶ llama (our own pass) | generic (transformers)
          ├─ contract    Segment in, Pass out: what the rest of the engine knows of a model
          ├─ deltas      what adapters add to a linear layer, for rows of many adapters at once
          ├─ linear      one weight matrix, in each precision
          └─ weights     safetensors on disk
"""
