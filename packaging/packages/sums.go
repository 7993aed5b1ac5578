package main

import (
	"crypto/rand"
	"crypto/sha256"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/emmansun/gmsm/sm2"
	"github.com/emmansun/gmsm/sm3"
	"github.com/emmansun/gmsm/smx509"
)

// list writes the digests of all packages in dir (SHA256SUMS, SM3SUMS, in the form that sha256sum -c and openssl dgst -sm3
// read or write), signs the latter with SM2 (SM3SUMS.sig: DER over the file's bytes, GB/T 35276 with the default identity)
// and puts the public key beside it.
func list(dir string, key *sm2.PrivateKey) error {
	files, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	var sha, sm strings.Builder
	for _, f := range files {
		if !isPackage(f.Name()) {
			continue
		}
		data, err := os.ReadFile(filepath.Join(dir, f.Name()))
		if err != nil {
			return err
		}
		fmt.Fprintf(&sha, "%x  %s\n", sha256.Sum256(data), f.Name())
		fmt.Fprintf(&sm, "%x  %s\n", sm3.Sum(data), f.Name())
	}
	signature, err := key.SignWithSM2(rand.Reader, nil, []byte(sm.String()))
	if err != nil {
		return err
	}
	der, err := smx509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		return err
	}
	write := func(name string, data []byte) error { return os.WriteFile(filepath.Join(dir, name), data, 0o644) }
	return errors.Join(write("SHA256SUMS", []byte(sha.String())), write("SM3SUMS", []byte(sm.String())), write("SM3SUMS.sig", signature),
		write("release.pub", pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der})))
}

// loadKey reads release.key of a folder: SM2, PKCS #8, PEM; for trials throw-away.key, which is made where it is not there.
func loadKey(dir string, throwAway bool) (*sm2.PrivateKey, error) {
	file := filepath.Join(dir, "release.key")
	if throwAway {
		file = filepath.Join(dir, "throw-away.key")
	}
	text, err := os.ReadFile(file)
	if errors.Is(err, fs.ErrNotExist) && throwAway {
		fmt.Fprintln(os.Stderr, "生成一次性的签名密钥 making a throw-away key:", file)
		key, err := sm2.GenerateKey(rand.Reader)
		if err != nil {
			return nil, err
		}
		der, err := smx509.MarshalPKCS8PrivateKey(key)
		if err != nil {
			return nil, err
		}
		return key, errors.Join(os.MkdirAll(dir, 0o700), os.WriteFile(file, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), 0o600))
	}
	if err != nil {
		return nil, err
	}
	block, _ := pem.Decode(text)
	if block == nil {
		return nil, fmt.Errorf("%s is not PEM", file)
	}
	parsed, err := smx509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	key, ok := parsed.(*sm2.PrivateKey)
	if !ok {
		return nil, fmt.Errorf("%s is no SM2 key", file)
	}
	return key, nil
}
