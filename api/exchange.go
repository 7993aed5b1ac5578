package api

import (
	"encoding/binary"
	"encoding/hex"
	"errors"
	"math/rand/v2"
	"net/http"
	"net/netip"
	"strconv"
	"time"

	"github.com/labstack/echo/v4"

	"yinjian/api/wire"
)

// An exchange is one request and its answer: the answer's ResponseWriter, with what is known of the request so far. It
// travels as the writer, since echo's own store is a map for each request.
type exchange struct {
	http.ResponseWriter
	server        *Server
	id            string              // of the request, in hex
	application   string              // that has proved itself; "" for none
	source        string              // of a timestamp request without a key
	operator      string              // of the administration
	session       *Session            // of the administration; nil before it is known
	authorization *wire.Authorization // nil for an application that its client certificate alone proves
	certified     string              // that application
	remote        netip.Addr          // nobody's forwarding header is believed
	bodyRead      bool                // whole
	size          int                 // of the body of a request that has to prove itself
	text          string              // that its proof is over; "" before it is looked at
	room          []byte              // lent to the route until the answer is written, for what it decodes; nil: none
	bytes         int64               // of the share of those in flight that the address has
	admitted      bool
	place         string    // whose share of the requests at once is used; "" for none
	beside        int64     // of the share of what batches do beside their own place
	fields        [3]string // the values of X-Request-ID, Content-Type and Content-Length
}

// Unwrap is for http.ResponseController.
func (x *exchange) Unwrap() http.ResponseWriter { return x.ResponseWriter }

// exchangeOf is the request's; [Server.identify] has made it.
func exchangeOf(c echo.Context) *exchange { return c.Response().Writer.(*exchange) }

// Fields of every answer. The slices are shared by all answers and never changed: Header.Set and Add make new ones.
var (
	noStore = []string{"no-store"}
	noSniff = []string{"nosniff"}
)

// identify begins the exchange and gives the request its id, our own: an id from outside could repeat one in the log.
func (s *Server) identify(next echo.HandlerFunc) echo.HandlerFunc {
	return func(c echo.Context) error {
		var id [16]byte
		binary.NativeEndian.PutUint64(id[:], rand.Uint64()) // seeded by the system; an id is no secret
		binary.NativeEndian.PutUint64(id[8:], rand.Uint64())
		w := c.Response()
		x := &exchange{ResponseWriter: w.Writer, server: s, id: hex.EncodeToString(id[:]), remote: remoteAddr(c.Request())}
		w.Writer = x
		h := w.Header()
		x.fields[0] = x.id
		h["X-Request-Id"] = x.fields[0:1:1]
		h["Cache-Control"] = noStore
		h["X-Content-Type-Options"] = noSniff
		defer x.finish()
		return next(c)
	}
}

// finish gives back what is still held.
func (x *exchange) finish() {
	x.leave()
	if x.bytes != 0 {
		x.server.bodies.give(household(x.remote), x.bytes)
		x.bytes = 0
	}
}

// hold counts n bytes more against the share of those in flight that the address has, until [exchange.finish].
func (x *exchange) hold(n int64) bool {
	if !x.server.bodies.take(household(x.remote), n) {
		return false
	}
	x.bytes += n
	return true
}

// enter takes a place among the requests being handled.
func (x *exchange) enter(who string) bool {
	if !x.server.slots.take(who, 1) {
		return false
	}
	x.place, x.admitted = who, true
	return true
}

// widen takes room for more than one thing to be done for the request at once, and answers for how many: up to want, and one
// at least, which has the request's own place.
func (x *exchange) widen(want int) int {
	for x.place != "" && x.beside < int64(want)-1 && x.server.beside.take(x.place, 1) {
		x.beside++
	}
	return 1 + int(x.beside)
}

// leave gives all of it back, once.
func (x *exchange) leave() {
	if x.place != "" {
		x.server.slots.give(x.place, 1)
		if x.beside > 0 {
			x.server.beside.give(x.place, x.beside)
		}
		x.place, x.beside = "", 0
	}
}

// answering is called before an answer is written: from here on the request has no place among those being handled, and a
// client that reads slowly keeps its connection only for as long as an answer may take.
func (x *exchange) answering() {
	if !x.admitted {
		return
	}
	x.leave()
	// Not every ResponseWriter has a deadline; then the server's own bounds the answer.
	_ = http.NewResponseController(x.ResponseWriter).SetWriteDeadline(time.Now().Add(x.server.limits.Sending)) // interval
}

// send writes an answer, with its length, so that a long one is not chunked: there are old clients that read no chunks.
func send(c echo.Context, status int, media string, data []byte) error {
	x := exchangeOf(c)
	x.answering()
	w := c.Response()
	h := w.Header()
	x.fields[1], x.fields[2] = media, strconv.Itoa(len(data))
	h["Content-Type"], h["Content-Length"] = x.fields[1:2:2], x.fields[2:3:3]
	w.WriteHeader(status)
	if _, err := w.Write(data); err != nil {
		return errors.Join(errNotDelivered, err)
	}
	return nil
}

// errNotDelivered is no refusal: what was asked for is done.
var errNotDelivered = errors.New("api: the answer was not delivered")
