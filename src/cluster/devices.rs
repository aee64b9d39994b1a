//! The devices of the pool and their memory: asked of the workers' agents and of llama-server, else as the config says.
