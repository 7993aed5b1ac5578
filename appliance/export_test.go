package appliance

// What tests of this package reach from outside.

type (
	HandshakeKey     = handshakeKey
	ListenerIdentity = listenerIdentity
)

var (
	NewHandshakeKey = newHandshakeKey
	ErrHandshakes   = errHandshakes
	UntilHour       = untilHour
)

// NewListenerIdentity is one with a key in the cipher machine.
func NewListenerIdentity(slot *HandshakeKey) *ListenerIdentity { return &listenerIdentity{slot: slot} }

func (l *listenerIdentity) Use(chain [][]byte) error { return l.use(chain) }
func (l *listenerIdentity) Warnings() []string       { return l.warnings() }
