package build

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/pelletier/go-toml/v2"
	"github.com/sirupsen/logrus"

	"yinjian/hsm"
	"yinjian/hsm/pkcs11"
)

// tokenFile is token.toml of a folder of keys whose private ones are in a cipher machine.
type tokenFile struct {
	Module     string `toml:"module"`      // PKCS#11 library
	ModuleArgs string `toml:"module_args"` // for those that take one
	Profile    string `toml:"profile"`     // vendor profile, docs/hsm.md; "" is neutral
	Token      string `toml:"token"`       // its label
	PINFile    string `toml:"pin_file"`    // from the folder, if relative
	SecureBoot string `toml:"secure_boot"` // labels of the keys, RSA
	PCR        string `toml:"pcr"`
	Release    string `toml:"release"` // and SM2; "" where release.key is a file
}

// openToken gives the keys of a folder with token.toml. Nothing, and no error, when there is no such file.
func openToken(dir string) (*Keys, error) {
	text, err := os.ReadFile(filepath.Join(dir, "token.toml"))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	f := tokenFile{Profile: "neutral"}
	if err := toml.NewDecoder(bytes.NewReader(text)).DisallowUnknownFields().Decode(&f); err != nil {
		return nil, fmt.Errorf("token.toml: %w", err)
	}
	profile, err := pkcs11.ProfileByName(f.Profile)
	if err != nil {
		return nil, err
	}
	if !filepath.IsAbs(f.PINFile) {
		f.PINFile = filepath.Join(dir, f.PINFile)
	}
	pin, err := os.ReadFile(f.PINFile)
	if err != nil {
		return nil, err
	}
	defer clear(pin)
	log := logrus.New()
	log.SetOutput(os.Stderr)
	ctx := context.Background() // a machine that does not answer is ended by whoever called
	token, err := pkcs11.Open(ctx, pkcs11.Config{Module: f.Module, ModuleArgs: f.ModuleArgs, TokenLabel: f.Token,
		PIN: bytes.TrimRight(pin, "\r\n"), Profile: profile, Log: log})
	if err != nil {
		return nil, err
	}
	k := &Keys{close: token.Close}
	k.SecureBoot.Key, err = hsm.NewKey(ctx, token, f.SecureBoot, true)
	if err == nil {
		k.PCR, err = hsm.NewKey(ctx, token, f.PCR, true)
	}
	if err == nil && f.Release != "" {
		k.Release, err = hsm.NewKey(ctx, token, f.Release, true)
	}
	if err != nil {
		return nil, errors.Join(err, token.Close())
	}
	return k, nil
}
