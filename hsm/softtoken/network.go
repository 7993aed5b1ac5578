package softtoken

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"time"
)

// Files of a machine that listens on a network, in its folder: by them both sides know each other.
const (
	linkServer = "link-server.pem" // the machine's key and certificate
	linkClient = "link-client.pem" // for who may use it: key, certificate, the machine's certificate
)

// listenNetwork listens for modules on other machines: TLS 1.3, and both sides must show the very certificates that were
// made when the machine listened first. Whoever has link-client.pem is let in.
func listenNetwork(s *store, address string) (net.Listener, error) {
	server, client, err := linkCertificates(s)
	if err != nil {
		return nil, fmt.Errorf("softtoken: %w", err)
	}
	l, err := net.Listen("tcp", address)
	if err != nil {
		return nil, fmt.Errorf("softtoken: %w", err)
	}
	return tls.NewListener(l, &tls.Config{
		MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{server}, SessionTicketsDisabled: true,
		ClientAuth: tls.RequireAnyClientCert, // their owner is proved by TLS; whose it is, is compared here
		VerifyConnection: func(cs tls.ConnectionState) error {
			if !bytes.Equal(cs.PeerCertificates[0].Raw, client) {
				return errors.New("another certificate than that of " + linkClient)
			}
			return nil
		},
	}), nil
}

// linkCertificates reads the two files, or makes them. The machine's is written last: without it both are made anew.
func linkCertificates(s *store) (server tls.Certificate, client []byte, err error) {
	serverFile, clientFile := filepath.Join(s.dir, linkServer), filepath.Join(s.dir, linkClient)
	if _, err := os.Stat(serverFile); errors.Is(err, fs.ErrNotExist) {
		serverKey, serverCert, err := linkCertificate("yinjian softtoken", x509.ExtKeyUsageServerAuth)
		if err != nil {
			return server, nil, err
		}
		clientKey, clientCert, err := linkCertificate("yinjian softtoken client", x509.ExtKeyUsageClientAuth)
		if err != nil {
			return server, nil, err
		}
		if err := s.write(s.dir, linkClient, bytes.Join([][]byte{clientKey, clientCert, serverCert}, nil)); err != nil {
			return server, nil, err
		}
		if err := s.write(s.dir, linkServer, bytes.Join([][]byte{serverKey, serverCert}, nil)); err != nil {
			return server, nil, err
		}
	}
	if server, err = tls.LoadX509KeyPair(serverFile, serverFile); err != nil {
		return server, nil, err
	}
	pair, err := tls.LoadX509KeyPair(clientFile, clientFile)
	if err != nil {
		return server, nil, err
	}
	return server, pair.Certificate[0], nil
}

// linkCertificate makes a key and a certificate of its own, as PEM. It is known by its bytes, so it has no end (RFC 5280
// §4.1.2.5) and needs no clock.
func linkCertificate(name string, use x509.ExtKeyUsage) (key, cert []byte, err error) {
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, err
	}
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127))
	if err != nil {
		return nil, nil, err
	}
	form := &x509.Certificate{SerialNumber: serial, Subject: pkix.Name{CommonName: name}, NotBefore: time.Date(2000, 1, 1, 0, 0, 0, 0, time.UTC),
		NotAfter: time.Date(9999, 12, 31, 23, 59, 59, 0, time.UTC), KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{use}, BasicConstraintsValid: true}
	der, err := x509.CreateCertificate(rand.Reader, form, form, k.Public(), k)
	if err != nil {
		return nil, nil, err
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(k)
	if err != nil {
		return nil, nil, err
	}
	return pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: pkcs8}), pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), nil
}
