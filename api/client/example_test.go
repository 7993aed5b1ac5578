package client_test

import (
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"log"
	"os"
	"time"

	"crypto/x509"

	"github.com/emmansun/gmsm/sm3"

	"yinjian/api/client"
	"yinjian/api/wire"
)

// A discharge summary is signed with the signer's PIN, and its evidence is stored beside it.
func Example() {
	ctx := context.Background()
	var credentials struct {
		Application string
		KeyHex      string `json:"key_hex"`
	}
	b, err := os.ReadFile("out/demo/credentials/emr-binhai.json")
	if err == nil {
		err = json.Unmarshal(b, &credentials)
	}
	key, kerr := hex.DecodeString(credentials.KeyHex)
	ca, cerr := os.ReadFile("out/demo/tls-ca.pem")
	document, derr := os.ReadFile("out/demo/record.xml")
	if err := errors.Join(err, kerr, cerr, derr); err != nil {
		log.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(ca)
	c, err := client.New(client.Config{
		BaseURL: "https://yinjian.hospital.local:8443", AppID: credentials.Application, Key: key, RootCAs: roots, Clock: time.Now,
		Retry: client.Retry{Attempts: client.DefaultAttempts},
	})
	if err != nil {
		log.Fatal(err)
	}
	defer c.Close()

	// Consent by PIN, bound to this document.
	digest := sm3.Sum(document)
	grant, err := c.Authorize(ctx, &wire.AuthorizationRequest{Signer: "D10023", PIN: "asked of the signer", Digests: [][]byte{digest[:]}})
	if err != nil {
		log.Fatal(err) // never sent again: the signer is asked again
	}

	// The Idempotency-Key is stored with the document before the call, and used again until there is an answer.
	signed, err := c.Sign(ctx, "ZY20261118000731-v1-attending", &wire.SignRequest{
		Signer: "D10023", Algorithm: "SM2", Form: "cms", Role: "主治医师",
		Digest:   &wire.Digest{Algorithm: "SM3", Value: digest[:]},
		Document: wire.Document{ID: "ZY20261118000731", Type: "discharge-summary", MediaType: "application/xml"},
		Consent:  wire.Consent{AuthorizationID: grant.ID},
	})
	var refused *client.Problem
	switch {
	case client.OutcomeUnknown(err):
		fmt.Println("later again, with the same key:", err)
		return
	case errors.As(err, &refused):
		fmt.Println(refused.Detail, refused.Next) // for the person at the screen
		return
	case err != nil:
		log.Fatal(err) // nothing was signed
	}
	evidence, err := c.Evidence(ctx, signed.RecordID)
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(len(evidence))
}
