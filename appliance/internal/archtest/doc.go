// Package archtest holds ARCHITECTURE.md against the code. It has tests only: each package must be in the picture, each
// import between our packages must point down or be drawn, and HTTP, SQL, cgo and the clock must stay where the page
// says they are.
package archtest
