package appliance

import (
	"errors"
	"fmt"

	"github.com/emmansun/gmsm/smx509"

	"yinjian/tsa"
)

// CheckpointToken answers a check for the timestamp tokens that stand beside checkpoints, as audit.Options.CheckToken
// takes it: the token parses, holds over the SM3 of the checkpoint's signature in DER, and was signed by one of the
// units. Without units the signer may be anybody with a certificate for timestamping; its chain is not looked at.
func CheckpointToken(units ...*smx509.Certificate) func(signature, token []byte) error {
	return func(signature, token []byte) error {
		t, err := tsa.ParseToken(token)
		if err != nil {
			return err
		}
		report, err := t.Verify(tsa.ImprintOf(signature), units...)
		if err != nil {
			return fmt.Errorf("tsa: token: %w", err)
		}
		if report.Signer == nil {
			return errors.New("tsa: token: its signer's certificate is not known")
		}
		for _, u := range units {
			if report.Signer.Equal(u) {
				return nil
			}
		}
		if len(units) > 0 {
			return fmt.Errorf("tsa: token: signed by %q, serial %x, which is none of the units given", report.Signer.Subject, report.Signer.SerialNumber)
		}
		return nil
	}
}

// checkToken is CheckpointToken for this appliance's own units, with every certificate that they ever had.
func (a *Appliance) checkToken() func(signature, token []byte) error {
	var units []*smx509.Certificate
	for _, name := range a.unitNames() {
		for _, path := range a.directory.Paths("tsa:" + name) {
			units = append(units, path[0])
		}
	}
	return CheckpointToken(units...)
}
