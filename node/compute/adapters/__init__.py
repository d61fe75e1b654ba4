"""Adapters on disk and in memory: reading what ``peft`` writes, holding what is in use.

shelf ─▶ files ─▶ keys      names of tensors to modules; what is refused, and why
           │   ─▶ by_peft   methods whose merged weights PEFT computes
           │   ─▶ tensors   a safetensors header, checked before anything is loaded
           ├─▶ card         digest and ``edgemesh.json``
           └─▶ facts        the backbone's shape
"""
