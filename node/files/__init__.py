"""Files that nodes have from one another: adapters in versions, and the backbone.

file_list          a directory as names, sizes and digests; what a peer may ask us to write
adapter_directory  one adapter's directory: what it says of itself, and copies of it
index              what this machine knows of its adapters, on disk
library            the adapters' directory: notices what is new, installs, removes, makes room
blobs              answers peers who ask for one of these files
fetching           one directory from several peers at once, whole or not at all
model_files        the backbone's files: listed for others, or had before any registry is asked
distribution       keeps this node's adapters in step with the mesh
assembly           all of it as one part of the node
asking             what the commands ask of the mesh
leftovers          what this machine could do without
"""
