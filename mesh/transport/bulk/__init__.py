"""Bulk bytes between nodes: blobs in ranges from several holders, blocks many at a time.

    pure    blobs  ranges  frames  answers  waits
    disk    store (what is served: a protocol)  files (one that is served, one that arrives)
    server  budget  server (routes of ``mesh.transport.streams.PeerServer``)
    asker   connection  pool  client

Whatever goes wrong on the way is a miss and a line in the log: never an error, never a wrong value. See
``docs/adr/0018-bulk-bytes-over-https.md``.
"""
