package wire

// AddTimeSource is the body of POST /admin/v1/time/sources.
type AddTimeSource struct {
	Name    string `json:"name"`               // [A-Za-z0-9._-]{1,32}
	Group   string `json:"group"`              // sources that share an antenna share a group; 1–64 bytes
	Address string `json:"address"`            // host:port
	KeyID   int    `json:"key_id,omitempty"`   // symmetric authentication, 1–65535; left out: none
	KeyType string `json:"key_type,omitempty"` // "SHA256", "AES128", "AES256"
	KeyFile string `json:"key_file,omitempty"` // in chrony's format, on the appliance
	Reason  string `json:"reason"`
	Force   bool   `json:"force,omitempty"` // although it does not answer, or contradicts own time
}

// RemoveTimeSource is the body of POST /admin/v1/time/sources/{name}/remove.
type RemoveTimeSource struct {
	Name   string `json:"-"`
	Reason string `json:"reason"`
}

// ReadmitTime is the body of POST /admin/v1/time/readmit.
type ReadmitTime struct {
	Reason  string   `json:"reason"`
	Persons []string `json:"persons"` // the two who have held the time against another clock; 1–64 bytes each
}

// TimeHistory is the body of POST /admin/v1/time/history.
type TimeHistory struct {
	From string `json:"from,omitempty"` // RFC 3339; six hours before To if left out
	To   string `json:"to,omitempty"`   // now if left out
}

// StampService is the body of POST /admin/v1/tsa/stop and /start.
type StampService struct {
	Unit   string `json:"unit,omitempty"` // all if left out
	Reason string `json:"reason"`
}

// StampLog is the body of POST /admin/v1/tsa/log.
type StampLog struct {
	Lines int `json:"lines,omitempty"` // 1–1000; 20 if left out
}
