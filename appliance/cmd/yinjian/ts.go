package main

import (
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/big"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"yinjian/appliance/evidence"
	"yinjian/appliance/evidence/show"
	"yinjian/appliance/pki"
	"yinjian/tsa"
	"yinjian/tsa/ers"
)

// Exit statuses of `ts verify`, as yinjian-verify has them.
const (
	exitTokenInvalid       = 1
	exitTokenIndeterminate = 3
)

// Bounds of what is read, in bytes.
const (
	maxStamped = 1 << 30
	maxToken   = 64 << 20 // an archive timestamp has revocation lists inside
)

func timestampCommand() *cobra.Command {
	c := group(&cobra.Command{Use: "ts", Short: "时间戳：做请求、验证、查看，不需要设备 (timestamps: make a query, verify, show; needs no appliance)"})
	c.AddCommand(tsQueryCommand(), tsVerifyCommand(), tsShowCommand())
	return c
}

// digestOf hashes a file by the algorithm that people name.
func digestOf(algorithm, name string) (tsa.Imprint, error) {
	a, err := digestAlgorithm(algorithm)
	if err != nil {
		return tsa.Imprint{}, err
	}
	data, err := show.ReadFile(name, os.Stdin, maxStamped)
	if err != nil {
		return tsa.Imprint{}, err
	}
	return tsa.NewImprint(a.OID(), a.Sum(data))
}

// digestAlgorithm takes "sm3", "SHA-256", "sha256" …
func digestAlgorithm(name string) (ers.Algorithm, error) {
	for _, a := range []ers.Algorithm{ers.SM3, ers.SHA256, ers.SHA384, ers.SHA512} {
		if strings.EqualFold(name, string(a)) || strings.EqualFold(name, strings.ReplaceAll(string(a), "-", "")) {
			return a, nil
		}
	}
	return "", usageError{fmt.Errorf("摘要算法 %q：须为 sm3、sha256、sha384、sha512 (must be one of them)", name)}
}

func tsQueryCommand() *cobra.Command {
	var algorithm, digest, policy, out string
	var noNonce, noCert bool
	c := &cobra.Command{
		Use: "query [FILE]", Short: "为文件做时间戳请求 TimeStampReq，缺省 SM3、带随机数、要证书 (make a TimeStampReq for a file)",
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) > 1 || len(args) == 1 == (digest != "") {
				return usageError{errors.New("给出文件，或 --digest-value (give a file, or --digest-value)")}
			}
			return nil
		},
		RunE: func(_ *cobra.Command, args []string) error {
			req := &tsa.Request{CertReq: !noCert}
			var err error
			if digest != "" {
				a, aerr := digestAlgorithm(algorithm)
				value, herr := hex.DecodeString(digest)
				if err = errors.Join(aerr, herr); err == nil {
					req.Imprint, err = tsa.NewImprint(a.OID(), value)
				}
				if err != nil {
					return usageError{err}
				}
			} else if req.Imprint, err = digestOf(algorithm, args[0]); err != nil {
				return err
			}
			if !noNonce {
				if req.Nonce, err = rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 63)); err != nil {
					return err
				}
			}
			if policy != "" {
				for _, arc := range strings.Split(policy, ".") {
					n, err := strconv.Atoi(arc)
					if err != nil {
						return usageError{fmt.Errorf("--policy %q：须为对象标识符 (must be an object identifier)", policy)}
					}
					req.Policy = append(req.Policy, n)
				}
			}
			der, err := req.Bytes()
			if err != nil {
				return usageError{err}
			}
			if out == "-" {
				_, err = os.Stdout.Write(der)
				return err
			}
			return replaceFile(out, der)
		},
	}
	f := c.Flags()
	f.StringVar(&algorithm, "digest", "sm3", "摘要算法 sm3、sha256、sha384、sha512 (digest algorithm)")
	f.StringVar(&digest, "digest-value", "", "不给文件而给摘要，十六进制 (a digest instead of a file, hex)")
	f.StringVar(&policy, "policy", "", "策略的对象标识符；缺省由机构决定 (policy; the authority's own if left out)")
	f.BoolVar(&noNonce, "no-nonce", false, "不带随机数 (without a nonce)")
	f.BoolVar(&noCert, "no-cert", false, "不要求附证书 (do not ask for the certificate)")
	required(c, &out, "out", "请求文件，- 为标准输出 (where the request goes, - for standard output)")
	return c
}

// readToken reads a token or the response that holds it. Of a response that refuses it answers why.
func readToken(name string) ([]byte, error) {
	der, err := show.ReadFile(name, os.Stdin, maxToken)
	if err != nil {
		return nil, err
	}
	r, err := tsa.ParseResponse(der)
	switch {
	case err != nil:
		return der, nil // a token by itself, or nothing that is understood
	case r.Token == nil:
		return nil, fmt.Errorf("%s：时间戳机构拒绝了请求 (the authority refused): %w", name, r.Err())
	}
	return r.Token.DER, nil
}

func tsVerifyCommand() *cobra.Command {
	var anchors, document, digest, algorithm, query, crls, at, output string
	var asJSON bool
	c := &cobra.Command{
		Use:   "verify --anchors PATH (--document FILE | --digest-value HEX | --query FILE) TOKEN",
		Short: "验证时间戳或时间戳响应：与 yinjian-verify --token 同一判断；退出码 0 有效、1 无效、2 用法错误或读不到文件、3 无法判定 (verify a token or response; exit status as yinjian-verify)",
		Args:  exactArgs(1),
		RunE: func(_ *cobra.Command, args []string) error {
			misused := func(err error) error { return exitError{err, 2} }
			if err := checkOutput(output); err != nil {
				return err
			}
			trust, err := show.LoadTrust(anchors, "")
			if err != nil {
				return misused(err)
			}
			var in evidence.Input
			if at != "" {
				if in.At, err = time.Parse(time.RFC3339, at); err != nil {
					return usageError{fmt.Errorf("--at: %w", err)}
				}
			}
			if in.CRLs, err = show.ReadCRLs(crls); err != nil {
				return misused(err)
			}
			if document != "" {
				if in.Document, err = show.ReadFile(document, os.Stdin, maxStamped); err != nil {
					return misused(err)
				}
			}
			if digest != "" {
				if in.Digest, err = hex.DecodeString(digest); err != nil {
					return usageError{fmt.Errorf("--digest-value: %w", err)}
				}
				if algorithm != "" {
					a, err := digestAlgorithm(algorithm)
					if err != nil {
						return err
					}
					in.DigestAlgorithm = string(a)
				}
			}
			if query != "" {
				der, err := show.ReadFile(query, os.Stdin, maxToken)
				if err == nil {
					in.Query, err = tsa.ParseRequest(der)
				}
				if err != nil {
					return misused(fmt.Errorf("%s: %w", query, err))
				}
			}
			token, err := readToken(args[0])
			if err != nil {
				return misused(err)
			}
			report := evidence.VerifyToken(token, trust, in)
			if asJSON || output == "json" {
				err = writeJSON(os.Stdout, report)
			} else {
				show.Print(os.Stdout, report)
			}
			switch {
			case err != nil:
				return err
			case report.Verdict == pki.Invalid:
				return exitError{errors.New("无效 (invalid)"), exitTokenInvalid}
			case report.Verdict != pki.Valid:
				return exitError{errors.New("无法判定 (indeterminate)"), exitTokenIndeterminate}
			}
			return nil
		},
	}
	f := c.Flags()
	required(c, &anchors, "anchors", "信任锚：CA 证书的 PEM 文件或目录 (trust anchors: PEM file or folder)")
	f.StringVar(&document, "document", "", "所盖的文件 (what was stamped)")
	f.StringVar(&digest, "digest-value", "", "所盖的摘要，十六进制 (its digest, hex)")
	f.StringVar(&algorithm, "digest", "", "该摘要的算法，缺省即时间戳的 (algorithm of that digest; the token's own if left out)")
	f.StringVar(&query, "query", "", "所回答的请求 (the request that it answers, DER)")
	f.StringVar(&crls, "crls", "", "吊销列表目录：*.crl，DER (folder of CRLs, DER)")
	f.StringVar(&at, "at", "", "按此时刻判断时间戳是否已到期，RFC 3339；不给则只按盖戳的时刻；从不取本机时间 (judge at this time; without it, at genTime alone)")
	f.BoolVar(&asJSON, "json", false, "同 -o json")
	f.StringVarP(&output, "output", "o", "text", "text 或 json")
	c.MarkFlagsMutuallyExclusive("document", "digest-value")
	return c
}

func tsShowCommand() *cobra.Command {
	var asJSON bool
	c := &cobra.Command{
		Use: "show TOKEN", Short: "看一个时间戳或响应写了什么，不作验证 (what a token or response says; nothing is verified)", Args: exactArgs(1),
		RunE: func(_ *cobra.Command, args []string) error {
			der, err := readToken(args[0])
			if err != nil {
				return err
			}
			t, err := tsa.ParseToken(der)
			if err != nil {
				return fmt.Errorf("%s: %w", args[0], err)
			}
			if asJSON {
				return writeJSON(os.Stdout, show.StampOf(t))
			}
			show.PrintStamp(os.Stdout, show.StampOf(t))
			return nil
		},
	}
	c.Flags().BoolVar(&asJSON, "json", false, "以 JSON 给出 (as JSON)")
	return c
}

func writeJSON(w io.Writer, v any) error {
	enc := json.NewEncoder(w)
	enc.SetIndent("", "  ")
	return enc.Encode(v)
}
