"""Files that nodes have from one another: adapters in versions, and the backbone.

file_list   a directory as names, sizes and digests; what a peer may ask us to write
index       what this machine knows of its adapters, on disk
library     the adapters' directory: notices what is new, installs, removes, makes room
model_files the backbone's files: listed for others, or had from them before any registry is asked
blobs       answers peers who ask for one of these files
fetching    one directory from several peers at once, whole or not at all
distribution  keeps this node's files in step with the mesh
"""
