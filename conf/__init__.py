"""The configuration: a folder Python can import, so that Hydra finds it as `pkg://mlxchat.conf`."""
