package wire

// A Selftest is the answer of GET /admin/v1/applications/{id}/selftest: the last requests that named an application for tests,
// each step of their authentication with what is wrong.
type Selftest struct {
	Application string   `json:"application"`
	Name        string   `json:"name"`
	Stopped     bool     `json:"stopped"`
	Rights      []string `json:"rights"`
	// Certificate says whether a TLS client certificate is asked for: "" no, "hmac" beside the proof, "alone" instead of it.
	Certificate string    `json:"certificate,omitempty"`
	Now         string    `json:"now"` // RFC 3339, UTC
	Trusted     bool      `json:"trusted"`
	WindowS     int       `json:"window_s"` // by which a request's time may be off
	Names       []string  `json:"names"`    // hosts that the appliance is called by; none: any
	Arrivals    []Arrival `json:"arrivals"` // the newest first
}

// An Arrival is a request as it came, without its body and without most of its proof.
type Arrival struct {
	At            string   `json:"at"` // RFC 3339, UTC
	Remote        string   `json:"remote"`
	Method        string   `json:"method"`
	Path          string   `json:"path"` // with the query
	Host          string   `json:"host"`
	Headers       []string `json:"headers"` // their names
	ContentType   string   `json:"content_type"`
	Bytes         int      `json:"bytes"` // of the body
	Authorization string   `json:"authorization"`
	// StringToSign is what the appliance computes HMAC-SM3 over; "" where the header has no such form or no body was read.
	StringToSign string          `json:"string_to_sign"`
	Certificate  string          `json:"certificate,omitempty"` // subject of the one that was shown
	Code         string          `json:"code,omitempty"`        // "" when it was let through
	Detail       string          `json:"detail,omitempty"`
	Checks       []SelftestCheck `json:"checks"`
}

// A SelftestCheck is a step.
type SelftestCheck struct {
	ID     string `json:"id"`     // "header", "time", "host", "signature", "certificate", "outcome"
	Status string `json:"status"` // "passed", "failed", "not_checked"
	Detail string `json:"detail"`
	Next   string `json:"next,omitempty"`
}
