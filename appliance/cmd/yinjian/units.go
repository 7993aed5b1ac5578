package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/emmansun/gmsm/smx509"

	"yinjian/appliance/pki"
)

// unitsNotChecked is said when no certificate of a timestamp unit is at hand.
const unitsNotChecked = "时间戳证书未核对：未给 --tsa，日志公钥旁也没有 tsa-单元.pem (no unit's certificate was given: tokens were verified, but whose they are was not)"

// timestampUnits reads the certificates of the files; of none, those that the appliance leaves beside the log's key.
func timestampUnits(files []string, logKey string) ([]*smx509.Certificate, error) {
	found := files
	if len(files) == 0 && logKey != "" {
		entries, err := os.ReadDir(filepath.Dir(logKey))
		if err != nil {
			return nil, err
		}
		for _, e := range entries {
			if n := e.Name(); strings.HasPrefix(n, "tsa-") && strings.HasSuffix(n, ".pem") && !strings.HasPrefix(n, "tsa-ca-") {
				found = append(found, filepath.Join(filepath.Dir(logKey), n))
			}
		}
	}
	var units []*smx509.Certificate
	for _, name := range found {
		b, err := os.ReadFile(name)
		if err != nil {
			return nil, err
		}
		certs, err := pki.ParseCertificatePEMs(b)
		if err != nil {
			return nil, fmt.Errorf("--tsa %s: %w", name, err)
		}
		units = append(units, certs...)
	}
	return units, nil
}
