"""An HTTP server with the interface of OpenAI's API (docs/server.md), over any `answering.Engine`.

    opening      sockets, keys and TLS, before anything else is imported
    http         HTTP/1.1 on trio: bytes in, ASGI out
    app          which requests are let in, and what is said of each
    bodies       JSON bodies, checked, as dataclasses
    limiter      who is answered now, who waits, who is sent away
    served       what all paths share: the model, its engine, answers when it is their turn
    asking       answers of an engine, awaited
    chats, completions, responses   the paths that answer
    house        the devices at work
    page         the page for people
    replies      answers as JSON
    tools        calls of tools

h11 reads and writes HTTP, under a loop of our own. hypercorn, the server for trio, sends under a shield: a
client that stops reading would hold its answer, and the end of the process, for ever."""
