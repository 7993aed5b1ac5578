package api

import (
	"context"
	"net"
	"net/http"
)

// ConnState is what net/http calls.
var ConnState = connState

// Handled says that a request on the connection is being handled.
func Handled(conn net.Conn) {
	handled(new(http.Request).WithContext(connContext(context.Background(), conn)))
}
