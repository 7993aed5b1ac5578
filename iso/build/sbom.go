package build

import (
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"hash"
	"strings"

	"github.com/CycloneDX/cyclonedx-go"
	"github.com/emmansun/gmsm/sm3"
)

// hashes by the kernel's names.
var hashes = map[string]func() hash.Hash{"sha256": sha256.New, "sm3": sm3.New}

// SBOM lists every file of the image with its package, version, SHA-256 and SM3, as CycloneDX 1.6 in JSON: the same for
// the same tree.
func SBOM(t Tree, name, version string) ([]byte, error) {
	bom := cyclonedx.NewBOM()
	bom.Metadata = &cyclonedx.Metadata{Component: &cyclonedx.Component{Type: cyclonedx.ComponentTypeFirmware, Name: name, Version: version, BOMRef: name}}
	var parts []cyclonedx.Component
	packages := map[string]bool{}
	var files []cyclonedx.Component
	for _, path := range t.Names() {
		f := t[path]
		if !f.Mode.IsRegular() {
			continue
		}
		if pkg, version, ok := strings.Cut(f.Source, "="); ok && !packages[f.Source] {
			packages[f.Source] = true
			parts = append(parts, cyclonedx.Component{Type: cyclonedx.ComponentTypeLibrary, Name: pkg, Version: version, BOMRef: f.Source})
		}
		digest := sm3.Sum(f.Data)
		files = append(files, cyclonedx.Component{Type: cyclonedx.ComponentTypeFile, Name: "/" + path, BOMRef: "/" + path,
			Hashes: &[]cyclonedx.Hash{{Algorithm: cyclonedx.HashAlgoSHA256, Value: fmt.Sprintf("%x", sha256.Sum256(f.Data))}},
			// CycloneDX has no name for SM3.
			Properties: &[]cyclonedx.Property{{Name: "yinjian:sm3", Value: fmt.Sprintf("%x", digest)}, {Name: "yinjian:source", Value: f.Source}}})
	}
	all := append(parts, files...)
	bom.Components = &all
	text, err := json.MarshalIndent(bom, "", " ")
	return append(text, '\n'), err
}
