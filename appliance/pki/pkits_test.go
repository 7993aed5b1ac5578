package pki_test

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/emmansun/gmsm/smx509"

	"yinjian/appliance/pki"
)

func readModuleFile(t testing.TB, name string) []byte {
	t.Helper()
	data, err := os.ReadFile(filepath.Join(moduleDir(t, "github.com/emmansun/gmsm"), "smx509", "testdata", name))
	if err != nil {
		t.Skipf("gmsm's test data is not here: %v", err)
	}
	return data
}

// What PKITS calls valid and we do not pass, with the reason. Everything else it calls valid must be valid here.
var pkitsOmissions = map[string]string{
	"4.1.4": "DSA", "4.1.5": "DSA",
	"4.3.3": "names that differ by bytes", "4.3.4": "names that differ by bytes", "4.3.5": "names that differ by bytes",
	"4.3.10": "names that differ by bytes", "4.3.11": "names that differ by bytes",
	"4.4.19": "CRL by another key of the CA", "4.5.6": "CRL by another key of the CA",
	"4.5.1": "CRL by another key of the CA", "4.5.4": "CRL by another key of the CA",
	"4.6.15": "CRL by another key of the CA", "4.6.17": "CRL by another key of the CA",
	"4.13":   "name constraints",
	"4.14.4": "relative distribution point name", "4.14.5": "relative distribution point name", "4.14.7": "relative distribution point name",
	"4.14.18": "CRL by reasons", "4.14.19": "CRL by reasons",
	"4.14.22": "indirect CRL", "4.14.24": "indirect CRL", "4.14.25": "indirect CRL",
	"4.14.28": "indirect CRL", "4.14.29": "indirect CRL", "4.14.30": "indirect CRL", "4.14.33": "indirect CRL",
	"4.15.5": "delta CRL", "4.15.7": "delta CRL",
}

// NIST's PKITS (2011 edition, public domain), without the sections on policies, which we do not process. gmsm's source
// has its certificates and vectors but not its CRLs: without them, everything but revocation is compared. With
// YINJIAN_PKITS naming a folder that has certs/ and crls/ as NIST gives them, all is.
func TestPKITS(t *testing.T) {
	t.Parallel()
	var vectors []struct {
		Name              string
		CertPath, CRLPath []string
		ShouldValidate    bool
	}
	if err := json.Unmarshal(readModuleFile(t, "nist-pkits/vectors.json"), &vectors); err != nil {
		t.Fatal(err)
	}
	crls := os.Getenv("YINJIAN_PKITS")
	if crls == "" {
		t.Log("left out: NIST's CRLs (YINJIAN_PKITS is not set)")
	}
	// Sections whose invalid cases do not turn on a CRL.
	noCRLNeeded := map[string]bool{"1": true, "2": true, "3": true, "6": true, "16": true}
	ran := 0
	for _, v := range vectors {
		number, _, _ := strings.Cut(v.Name, " ")
		section := strings.Split(number, ".")[1]
		switch section {
		case "8", "9", "10", "11", "12":
			continue
		}
		ran++
		o := pki.Options{At: time.Date(2020, 6, 1, 0, 0, 0, 0, time.UTC), Purpose: pki.StaffSigning}
		unreadable := false
		for i, file := range v.CertPath {
			c, err := pki.ParseCertificate(readModuleFile(t, "nist-pkits/certs/"+file))
			switch {
			case err != nil:
				unreadable = true
			case i == 0:
				o.Anchors = []*smx509.Certificate{c}
			case i == len(v.CertPath)-1:
				o.Leaf = c
			default:
				o.Intermediates = append(o.Intermediates, c)
			}
		}
		if crls != "" {
			for _, file := range v.CRLPath {
				der, err := os.ReadFile(filepath.Join(crls, "crls", file))
				if err != nil {
					t.Fatal(err)
				}
				if c, err := pki.ParseCRL(der); err == nil {
					o.CRLs = append(o.CRLs, c)
				}
			}
		}
		verdict := pki.Invalid
		var checks []pki.Check
		if !unreadable {
			// PKITS's certificates are for encryption too; the purpose is left out of the comparison.
			for _, c := range pki.VerifyPath(o).Checks {
				if c.ID != pki.CheckPathPurpose {
					checks = append(checks, c)
				}
			}
			var required []string
			for _, id := range pki.PathChecks() {
				if id != pki.CheckPathPurpose && (crls != "" || id != pki.CheckPathRevocation) {
					required = append(required, id)
				}
			}
			verdict = pki.VerdictOf(checks, required...)
		}
		omitted := pkitsOmissions[number]
		if omitted == "" {
			omitted = pkitsOmissions["4."+section]
		}
		valid := verdict == pki.Valid
		switch {
		case valid && !v.ShouldValidate && (crls != "" || noCRLNeeded[section]):
			t.Errorf("%s: valid: %+v", v.Name, checks)
		case !valid && v.ShouldValidate && omitted == "":
			t.Errorf("%s: %s: %+v", v.Name, verdict, checks)
		case valid && v.ShouldValidate && omitted != "" && crls != "":
			t.Errorf("%s: valid, though we thought not for %s", v.Name, omitted)
		}
	}
	if ran < 150 {
		t.Errorf("%d vectors, expected more", ran)
	}
}
