package build

import (
	"bytes"
	"crypto"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"os"

	"github.com/emmansun/gmsm/sm2"
	"github.com/emmansun/gmsm/sm3"

	"yinjian/appliance/update"
	"yinjian/iso/layout"
)

// bundle writes the update bundle of an image: its manifest to manifestFile, and the whole, signed, to file.
func bundle(cfg *Config, image layout.Image, root layout.Root, rootFile string, kernel []byte, manifestFile, file string) error {
	packed, err := os.ReadFile(rootFile)
	if err != nil {
		return err
	}
	manifest, err := json.MarshalIndent(update.Manifest{
		Format: update.Format, Image: image, MinIndex: cfg.MinIndex, Floor: cfg.Floor, Notes: cfg.Notes, Kernel: fileOf(kernel),
		Root: update.RootFile{File: fileOf(packed), Hash: hex.EncodeToString(root.Hash), Algorithm: root.Algorithm, DataBlocks: root.DataBlocks, Salt: hex.EncodeToString(root.Salt)},
	}, "", "\t")
	if err != nil {
		return err
	}
	manifest = append(manifest, '\n')
	if err := os.WriteFile(manifestFile, manifest, 0o644); err != nil {
		return err
	}
	value, err := signManifest(manifest, cfg.Keys.Release)
	if err != nil {
		return err
	}
	out, err := os.Create(file)
	if err != nil {
		return err
	}
	defer out.Close()
	if err := update.Create(out, manifest, []update.Signature{{By: update.ByRelease, Value: value}}, bytes.NewReader(packed), bytes.NewReader(kernel)); err != nil {
		return err
	}
	cfg.Log("升级包清单的 SM3，请与升级包分开公布 (SM3 of the manifest, to be published apart from the bundle): %s", fileOf(manifest).SM3)
	return out.Close()
}

// signManifest signs with SM2 and the default identity, whichever signer has the key.
func signManifest(manifest []byte, key crypto.Signer) ([]byte, error) {
	value, err := key.Sign(rand.Reader, update.Signed(manifest), sm2.DefaultSM2SignerOpts)
	if err != nil {
		return nil, fmt.Errorf("signing the manifest: %w", err)
	}
	return value, nil
}

// fileOf is what a manifest says of bytes.
func fileOf(b []byte) update.File {
	a, c := sm3.Sum(b), sha256.Sum256(b)
	return update.File{Size: int64(len(b)), SM3: hex.EncodeToString(a[:]), SHA256: hex.EncodeToString(c[:])}
}
