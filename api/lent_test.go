package api_test

import (
	"bytes"
	"context"
	"crypto/rand"
	"reflect"
	"strings"
	"testing"

	"yinjian/appliance/account"
	"yinjian/appliance/sign"
)

// A request's body is read into memory that the next request gets: nothing of what signing was asked for may lie there. Bodies of every
// length, over the first read and over what is lent, arrive whole.
func TestLentBodies(t *testing.T) {
	t.Parallel()
	sv := newServices()
	var kept []*sign.Request
	inner := sv.sign
	sv.sign = func(ctx context.Context, app *account.Application, req *sign.Request) (*sign.Result, error) {
		held := *req
		held.Content = bytes.Clone(req.Content) // the memory is the next request's afterwards
		kept = append(kept, &held)
		return inner(ctx, app, req)
	}
	k := startWith(t, sv)
	sizes := []int{1, 40, 2048, 2800, 3000, 3100, 5000, 5900, 6000, 9000, 40_000, 2048}
	var sent [][]byte
	var roles []string
	for i, n := range sizes {
		content := make([]byte, n)
		rand.Read(content)
		role := strings.Repeat(string(rune('a'+i)), 20)
		sent, roles = append(sent, content), append(roles, role)
		got := k.do(call{path: "/v1/sign", body: encode(t, m{
			"signer": "D1001", "algorithm": "SM2", "form": "raw", "content": content, "role": role,
			"document": m{"id": "D" + role, "type": "note", "media_type": "text/plain"}, "consent": m{"method": "app-asserted", "assertion": role},
		})})
		if got.status != 200 {
			t.Fatalf("%d bytes: %d %s", n, got.status, got.body)
		}
	}
	if len(kept) != len(sizes) {
		t.Fatalf("%d requests", len(kept))
	}
	for i, r := range kept {
		if !bytes.Equal(r.Content, sent[i]) || r.Role != roles[i] || r.Document.ID != "D"+roles[i] || !reflect.DeepEqual(r.Consent.Assertion, roles[i]) {
			t.Errorf("request %d of %d bytes is not as it was sent: %d bytes, %q, %q", i, sizes[i], len(r.Content), r.Role, r.Document.ID)
		}
	}
}
