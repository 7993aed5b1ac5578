package api

// ConnState is what net/http calls.
var ConnState = connState
