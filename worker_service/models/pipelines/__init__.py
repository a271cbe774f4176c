"""How a pipeline of diffusers is loaded, fitted to its device, described and tried."""
