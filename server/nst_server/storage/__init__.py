"""What outlives the server: jobs and their events in a database, pictures and checkpoints in a folder or a bucket.

    records.py     the rows, as the rest of the server sees them
    database.py    JobStore: every change of a job, each in one transaction
    blobs.py       Blobs: bytes by their SHA-256, and objects by name
    reserve.py     room on the disk that deletions may have
    faults.py      which refusal stands for which error of a disk, a database or an object store
    tables.py      the schema; migrations/ makes it, and brings older ones up to it

Knows nothing of gRPC, the contract, or how a job is computed.
"""
