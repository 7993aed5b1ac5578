package wire

// SetProduction is the body of POST /admin/v1/applications/{id}/production.
type SetProduction struct {
	ID         string `json:"-"`
	Production bool   `json:"production"`
	Reason     string `json:"reason"` // 1–256 bytes
}
