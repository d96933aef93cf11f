"""How FastAPI and Starlette treat decorated endpoints, in memory."""
