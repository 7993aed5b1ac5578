package build

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/binary"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"github.com/emmansun/gmsm/sm2"
	"github.com/emmansun/gmsm/smx509"
)

// Keys sign an image. Each is a [crypto.Signer]: a file's for tests, a cipher machine's for a release.
type Keys struct {
	SecureBoot Signer        // boot loader and kernels; its certificate is in the firmware's db
	PCR        crypto.Signer // policies by which the data volume opens
	Release    crypto.Signer // SM2: manifests of update bundles; installed machines have its public key in their root
	// Enrol are the files that systemd-boot enrols in the firmware's setup mode, by name: PK.auth, KEK.auth, db.auth.
	// May be empty: then the site enrols by the firmware's own menu.
	Enrol map[string][]byte

	close func() error
}

// Close lets go of a cipher machine.
func (k Keys) Close() error {
	if k.close == nil {
		return nil
	}
	return k.close()
}

// enrolled are the firmware's variables, and who signs each: the platform key itself, then KEK, then db.
var enrolled = []struct{ name, by string }{{"PK", "PK"}, {"KEK", "PK"}, {"db", "KEK"}}

// LoadKeys reads the files that [MakeKeys] writes, or others of the same names: db.key, pcr.key and release.key (PKCS #8, PEM),
// db.crt and, if they are there, the .auth files. With a token.toml in the folder the keys are in a cipher machine instead.
func LoadKeys(dir string) (Keys, error) {
	var k Keys
	held, err := openToken(dir)
	if err != nil {
		return k, err
	}
	if held != nil {
		k = *held
	} else {
		if k.SecureBoot.Key, err = readKey(filepath.Join(dir, "db.key")); err != nil {
			return k, err
		}
		if k.PCR, err = readKey(filepath.Join(dir, "pcr.key")); err != nil {
			return k, err
		}
	}
	if k.Release == nil {
		file := filepath.Join(dir, "release.key")
		if k.Release, err = readKey(file); errors.Is(err, os.ErrNotExist) {
			err = fmt.Errorf("%w: openssl genpkey -algorithm SM2 -out %s makes one", err, file)
		}
		if err != nil {
			return k, errors.Join(err, k.Close())
		}
	}
	k.Enrol = map[string][]byte{}
	if k.SecureBoot.Certificate, err = readCertificate(filepath.Join(dir, "db.crt")); err != nil {
		return k, errors.Join(err, k.Close())
	}
	// What it signs must be what the certificate verifies: the firmware would refuse every image.
	if same, ok := k.SecureBoot.Key.Public().(*rsa.PublicKey); !ok || !same.Equal(k.SecureBoot.Certificate.PublicKey) {
		return k, errors.Join(fmt.Errorf("%s: db.crt is not the key's certificate", dir), k.Close())
	}
	if public, ok := k.Release.Public().(*ecdsa.PublicKey); !ok || public.Curve != sm2.P256() {
		return k, errors.Join(fmt.Errorf("%s: the release key is no SM2 key", dir), k.Close())
	}
	for _, v := range enrolled {
		text, err := os.ReadFile(filepath.Join(dir, v.name+".auth"))
		if err == nil {
			k.Enrol[v.name+".auth"] = text
		} else if !errors.Is(err, os.ErrNotExist) {
			return k, errors.Join(err, k.Close())
		}
	}
	return k, nil
}

func readPEM(file string) ([]byte, error) {
	text, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	block, _ := pem.Decode(text)
	if block == nil {
		return nil, fmt.Errorf("%s is not PEM", file)
	}
	return block.Bytes, nil
}

func readKey(file string) (crypto.Signer, error) {
	der, err := readPEM(file)
	if err != nil {
		return nil, err
	}
	key, err := smx509.ParsePKCS8PrivateKey(der)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	signer, ok := key.(crypto.Signer)
	if !ok {
		return nil, fmt.Errorf("%s: this key cannot sign", file)
	}
	return signer, nil
}

func readCertificate(file string) (*x509.Certificate, error) {
	der, err := readPEM(file)
	if err != nil {
		return nil, err
	}
	return x509.ParseCertificate(der)
}

// MakeKeys writes throw-away keys for tests and evaluation into a new folder: a platform key, a key exchange key, the
// key for EFI programs and the one for PCR policies, RSA of 2048 bits, with certificates, signature lists (.esl) and the
// signed variables (.auth, by efitools), and the release key, SM2. Whoever has the folder can make images that such a machine
// starts and installs.
func MakeKeys(dir string, now time.Time) error {
	if err := os.Mkdir(dir, 0o700); err != nil {
		return err
	}
	write := func(name, kind string, der []byte) error {
		return os.WriteFile(filepath.Join(dir, name), pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600)
	}
	release, err := sm2.GenerateKey(rand.Reader)
	if err != nil {
		return err
	}
	der, err := smx509.MarshalPKCS8PrivateKey(release)
	if err != nil {
		return err
	}
	if err := write("release.key", "PRIVATE KEY", der); err != nil {
		return err
	}
	for i, name := range []string{"PK", "KEK", "db", "pcr"} {
		key, err := rsa.GenerateKey(rand.Reader, 2048)
		if err != nil {
			return err
		}
		der, err := x509.MarshalPKCS8PrivateKey(key)
		if err != nil {
			return err
		}
		if err := write(name+".key", "PRIVATE KEY", der); err != nil {
			return err
		}
		if name == "pcr" {
			break // has no certificate
		}
		// The firmware looks at no dates; a board's clock may stand anywhere.
		template := &x509.Certificate{SerialNumber: big.NewInt(int64(i + 1)), Subject: pkix.Name{CommonName: "Yinjian throw-away " + name},
			NotBefore: now.Add(-24 * time.Hour), NotAfter: now.AddDate(20, 0, 0), KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign,
			IsCA: true, BasicConstraintsValid: true}
		cert, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
		if err != nil {
			return err
		}
		if err := write(name+".crt", "CERTIFICATE", cert); err != nil {
			return err
		}
		if err := os.WriteFile(filepath.Join(dir, name+".esl"), signatureList(cert), 0o600); err != nil {
			return err
		}
	}
	for _, v := range enrolled {
		cmd := exec.Command("sign-efi-sig-list", "-t", now.UTC().Format(time.DateTime), "-k", v.by+".key", "-c", v.by+".crt", v.name, v.name+".esl", v.name+".auth")
		cmd.Dir = dir
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("sign-efi-sig-list: %w: %s", err, out)
		}
	}
	return nil
}

// signatureList is EFI_SIGNATURE_LIST with one X.509 certificate (UEFI 2.10 §32.4.1). The owner is of no meaning here.
func signatureList(cert []byte) []byte {
	le := binary.LittleEndian
	b := []byte{0xa1, 0x59, 0xc0, 0xa5, 0xe4, 0x94, 0xa7, 0x4a, 0x87, 0xb5, 0xab, 0x15, 0x5c, 0x2b, 0xf0, 0x72} // EFI_CERT_X509_GUID
	b = le.AppendUint32(b, uint32(28+16+len(cert)))
	b = le.AppendUint32(b, 0)
	b = le.AppendUint32(b, uint32(16+len(cert)))
	return append(append(b, make([]byte, 16)...), cert...)
}
