"""Version 1 of the contract: `*_pb2` modules hold the messages, `*_pb2_grpc` the stubs and servicers."""
