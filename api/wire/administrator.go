package wire

import (
	"encoding/hex"
	"slices"

	"github.com/emmansun/gmsm/sm3"
)

// Login is the body of POST /admin/v1/login.
type Login struct {
	Name     string `json:"name"` // the administrator's id
	Password string `json:"password"`
	// Challenge is one of LoginChallenge's; Signature is SM2 with SM3 (DER, the default identifier of GM/T 0009) over
	// "YINJIAN LOGIN\0" and the challenge, by the key of the administrator's certificate. Where there is none, both are left out.
	Challenge []byte `json:"challenge,omitempty"`
	Signature []byte `json:"signature,omitempty"`
}

// LoginChallenge is the body of POST /admin/v1/login/challenge.
type LoginChallenge struct{}

// A LoginChallenged is its answer: 32 bytes, good for one login within two minutes.
type LoginChallenged struct {
	Challenge []byte `json:"challenge"`
}

// Logout is the body of POST /admin/v1/logout.
type Logout struct{}

// A LoggedIn is the answer to a login, and of GET /admin/v1/session without the token.
type LoggedIn struct {
	// Session is what later requests bear: "Authorization: Bearer" and this.
	Session       string `json:"session,omitempty"`
	Administrator string `json:"administrator"` // id
	Name          string `json:"name"`
	Role          string `json:"role"`
	MustChange    bool   `json:"must_change"` // the password, before anything else
	IdleS         int    `json:"idle_s"`      // it ends when it was not used for so long
	EndsS         int    `json:"ends_s"`      // and at the latest in so long
}

// ChangePassword is the body of POST /admin/v1/password: one's own. All sessions of the administrator end.
type ChangePassword struct {
	Old      string `json:"old"`
	Password string `json:"password"`
}

// AddAdministrator is the body of POST /admin/v1/administrators.
type AddAdministrator struct {
	ID       string `json:"id"`   // [a-z0-9][a-z0-9.-]{1,31}
	Name     string `json:"name"` // 1–64 bytes
	Role     string `json:"role"` // "system", "security", "audit", "operator"
	Password string `json:"password"`
	// Certificate is what logins have to be signed with (PEM or DER, SM2); left out: the password suffices.
	Certificate []byte `json:"certificate,omitempty"`
}

// BootstrapAdministrators is the body of POST /admin/v1/administrators/bootstrap: three, one of each of system, security, audit.
type BootstrapAdministrators struct {
	Administrators []AddAdministrator `json:"administrators"`
}

// SetAdministratorPassword is the body of POST /admin/v1/administrators/{id}/password.
type SetAdministratorPassword struct {
	ID       string `json:"-"`
	Password string `json:"password"`
}

// SetAdministratorCertificate is the body of POST /admin/v1/administrators/{id}/certificate.
type SetAdministratorCertificate struct {
	ID string `json:"-"`
	// Certificate is as in AddAdministrator; left out: none any more.
	Certificate []byte `json:"certificate,omitempty"`
}

// A Proposed is the answer (202) to a request that a second person has to approve.
type Proposed struct {
	Proposal  string   `json:"proposal"`  // id
	SM3       string   `json:"sm3"`       // of "POST", path and body, each after the first preceded by a zero byte
	Approvers []string `json:"approvers"` // roles
	EndsS     int      `json:"ends_s"`    // seconds until nobody can approve it any more
}

// A Proposal is what the administrators see of one.
type Proposal struct {
	Proposed
	Path     string `json:"path"`
	Title    string `json:"title"`
	Body     any    `json:"body"` // secrets are left out, long values are digests
	By       string `json:"by"`
	Since    string `json:"since,omitempty"`
	State    string `json:"state"` // "pending", "done", "failed", "declined", "expired"
	Approver string `json:"approver,omitempty"`
	// Failed says why it failed.
	Failed *Problem `json:"failed,omitempty"`
	// Answer is what the request would have been answered: the first person's alone, until it is confirmed.
	Answer any `json:"answer,omitempty"`
	// AnswerEndsS is how many seconds that still is; 0: there is none, or none any more.
	AnswerEndsS int `json:"answer_ends_s,omitempty"`
}

// Decide is the body of POST /admin/v1/approvals/{id}/approve, /decline and /confirm.
type Decide struct {
	ID     string `json:"-"`
	SM3    string `json:"sm3"`              // of the proposal that was looked at
	Reason string `json:"reason,omitempty"` // 1–256 bytes
}

// ConfirmedBy are the two persons of a request: given by whoever sends it over an open local socket, else those who proposed
// and approved it.
func (r *SetCustodians) ConfirmedBy() *[]string { return &r.Persons }

// ConfirmedBy is likewise.
func (r *BeginBackup) ConfirmedBy() *[]string { return &r.Persons }

// ConfirmedBy is likewise.
func (r *FileReport) ConfirmedBy() *[]string { return &r.Persons }

// ConfirmedBy is likewise.
func (r *AddPeer) ConfirmedBy() *[]string { return &r.Persons }

// ConfirmedBy is likewise.
func (r *RemovePeer) ConfirmedBy() *[]string { return &r.Persons }

// ConfirmedBy is likewise.
func (r *SealUnlock) ConfirmedBy() *[]string { return &r.Persons }

// ConfirmedBy is likewise.
func (r *ReadmitTime) ConfirmedBy() *[]string { return &r.Persons }

// Alone says that one person may do it: a trial writes nothing.
func (r *ImportSigners) Alone() bool { return r.Trial }

// RequestSM3 names a request that two persons decide: the same on whatever machine it is made of the same things.
func RequestSM3(method, path string, body []byte) string {
	sum := sm3.Sum(slices.Concat([]byte(method), []byte{0}, []byte(path), []byte{0}, body))
	return hex.EncodeToString(sum[:])
}

// Alone says that one person may do it: a request for the certificate of a key that is there makes no key.
func (r *RequestCertificate) Alone() bool { return !r.NewKey }
