"""The OpenAI-compatible interface on the unix socket.

server    uvicorn on given sockets, woken only by work
protocol  who is at the other end, and every bound on a connection
app       endpoints: one short function each
streaming answers while they are made; ends the work when the client goes away
openai    pure translation of requests; `rendering` of answers
jsonbody  bytes of strangers to a checked object
"""
