"""HTTP faces of the engine: the Docker Engine API as one table of routes, and its two hosts.

    routes     the table (method, path pattern, handler), and how a request finds its row: read it to add a route
    call       one request as a handler sees it: words of the path and query, JSON body, streams in and out, threads
    errors     which error is which status code, and docker's `{"message": …}`
    handler    tornado's side of a call; the only module that knows both
    wire       a connection that leaves tornado before the body: files in and out past the event loop
    hijack     a connection taken over: the raw stream of attach, exec and sessions, with half-close; WebSockets
    server     the daemon: unix and TCP sockets, TLS, socket activation
    jupyter    the other host: the same table below a Jupyter server's base URL, behind its login
    system containers execs volumes networks events …   the handlers, one module for each group of the API

Handlers validate with msgspec, call one service in a thread, and hold no logic. Source: Docker Engine API 1.24 to 1.50.
"""
