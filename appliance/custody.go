package appliance

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/emmansun/gmsm/sm2"
	"github.com/emmansun/gmsm/smx509"

	"yinjian/api"
	"yinjian/appliance/account"
	"yinjian/appliance/custody"
	"yinjian/appliance/problem"
	"yinjian/hsm"
)

// custodyPolicy is the directory's view of hsm.custody, nil without it.
func (c *Config) custodyPolicy() (*account.CustodyPolicy, error) {
	if c.HSM.Custody == nil {
		return nil, nil
	}
	p := &account.CustodyPolicy{KEK: c.HSM.Custody.KEK, CampusMACs: c.HSM.Custody.CampusMACs}
	if c.HSM.Custody.Officers == "" {
		return p, nil
	}
	b, err := os.ReadFile(c.HSM.Custody.Officers)
	if err != nil {
		return nil, fmt.Errorf("hsm.custody.officers: %w", err)
	}
	block, _ := pem.Decode(b)
	if block == nil || block.Type != "PUBLIC KEY" {
		return nil, fmt.Errorf("hsm.custody.officers: %s 不是 PEM 公钥 (no public key in PEM)", c.HSM.Custody.Officers)
	}
	pub, err := smx509.ParsePKIXPublicKey(block.Bytes)
	if err != nil {
		return nil, fmt.Errorf("hsm.custody.officers: %w", err)
	}
	point, ok := pub.(*ecdsa.PublicKey)
	if !ok || !sm2.IsSM2PublicKey(point) {
		return nil, fmt.Errorf("hsm.custody.officers: %s 不是 SM2 公钥 (no SM2 key)", c.HSM.Custody.Officers)
	}
	p.Officers = elliptic.Marshal(point.Curve, point.X, point.Y)
	return p, nil
}

// checkCampusMACs refuses to start without the MAC keys of hsm.custody, and with one that could leave the machine.
func (a *Appliance) checkCampusMACs(ctx context.Context) error {
	if c := a.cfg.HSM.Custody; c == nil || !c.CampusMACs {
		return nil
	}
	for _, use := range account.CampusMACs {
		label := custody.MACLabel(use, a.cfg.HSM.Custody.KEK)
		info, err := a.tokens[hsm.Log].FindKey(ctx, label)
		switch {
		case errors.Is(err, hsm.ErrKeyNotFound):
			return fmt.Errorf("hsm.custody.campus_macs: log 槽位没有密钥 %s；先由保管人的份额导入：yinjian ceremony restore（见 docs/custody.md“两院区”），或去掉此项 (no such key in the log slot: bring it from the custodians' shares, or take this setting out): %w", label, err)
		case err != nil:
			return fmt.Errorf("hsm.custody.campus_macs: key %q: %w", label, err)
		case info.Algorithm != hsm.HMACSM3 || info.Extractable || !info.Sensitive:
			return fmt.Errorf("hsm.custody.campus_macs: log 槽位的密钥 %s 不是不可导出的 HMAC-SM3 密钥，不使用 (it is %s, extractable %v, sensitive %v; it is not used)", label, info.Algorithm, info.Extractable, info.Sensitive)
		}
	}
	return nil
}

// endConsentsEvery is how long an ended authorisation's custody keys stay unwrapped at most.
const endConsentsEvery = 10 * time.Second

func (a *Appliance) endConsents(ctx context.Context) error {
	tick := time.NewTicker(endConsentsEvery)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			a.directory.EndConsents()
		case <-ctx.Done():
			return nil
		}
	}
}

func (d admin) RecoverSigner(ctx context.Context, actor string, req api.RecoverSigner) (any, error) {
	var shares []custody.Share
	defer func() {
		for i := range shares {
			shares[i].Wipe()
		}
	}()
	for i, text := range req.Shares {
		s, err := custody.ParseShare(string(text))
		if err != nil {
			return nil, problem.Invalid(fmt.Sprintf("shares[%d]", i), "%v", err)
		}
		shares = append(shares, s)
	}
	return d.view(d.a.directory.RecoverPIN(ctx, actor, req.Signer, req.PIN, shares))
}

func (d admin) Ceremony(ctx context.Context, actor string, req api.Ceremony) (any, error) {
	m, err := custody.ParseMinutes(req.Minutes)
	if err != nil {
		return nil, problem.Invalid("minutes", "%v", err)
	}
	if err := d.a.directory.Ceremony(ctx, actor, m.Body.KEK, req.Minutes, m.Signature); err != nil {
		return nil, err
	}
	return json.RawMessage(`{"journalled":true}`), nil
}

func (d admin) Rederive(ctx context.Context, actor string, _ api.Rederive) (any, error) {
	return d.a.directory.Rederive(ctx, actor)
}

// custodyWarnings says what an evaluator would otherwise have to find out about custody keys.
func (a *Appliance) custodyWarnings() (out []string) {
	if n := a.directory.TokenSealed(); n > 0 {
		out = append(out, fmt.Sprintf("%d 名签名人没有 PIN，其托管密钥只由密码机封存，凭应用声称即可使用 (%d signers have no PIN: the cipher machine alone opens their custody keys)", n, n))
	}
	if n := a.directory.NotEscrowed(); n > 0 {
		out = append(out, fmt.Sprintf("%d 名签名人的密钥未交现任保管干部，忘记 PIN 时现任干部不能恢复；换一次 PIN 即补交 (%d signers' keys are not sealed to the present officers; their next PIN does it)", n, n))
	}
	if behind, elsewhere := a.directory.OwnMACs(); behind+elsewhere > 0 {
		if behind > 0 {
			out = append(out, fmt.Sprintf("%d 名签名人、应用仍由本机密码机自己的 MAC 密钥派生，只在本院区可用：应用与无 PIN 的用 yinjian ceremony rederive，其余在下次输 PIN 时随之改 (%d signers and applications are usable at this campus alone; see ceremony rederive)", behind, behind))
		}
		if elsewhere > 0 {
			out = append(out, fmt.Sprintf("%d 名签名人、应用由另一院区密码机自己的或本机没有的 MAC 密钥派生，在本院区不能验证 (%d signers and applications are derived with MAC keys that are not in this campus's machine)", elsewhere, elsewhere))
		}
	}
	if c := a.cfg.HSM.Custody; c != nil && c.Officers == "" {
		out = append(out, "没有保管干部的公钥：忘记 PIN 的托管密钥无人能恢复 (no officers: nobody opens custody keys whose PIN was forgotten)")
	}
	return out
}
