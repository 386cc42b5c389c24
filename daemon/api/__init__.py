"""The OpenAI-compatible interface on the unix socket.

server    uvicorn on given sockets, woken only by work
protocol  who is at the other end, and every bound on a connection
gate      the way in from the network: a bound, and TLS; `tls` has the certificate
front     headers that mean one thing, and the login of those who come with a key (`keys`)
app       which path is which; `endpoints` one short function each, `network` those for keys
streaming answers while they are made; ends the work when the client goes away
choices   several answers to one request as one stream of events
openai    pure translation of requests (`params`, `messages`, `texts`); `rendering` and `answers` of answers
jsonbody  bytes of strangers to a checked object
"""
