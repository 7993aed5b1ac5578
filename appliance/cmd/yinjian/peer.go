package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"

	"github.com/spf13/cobra"

	"yinjian/api/client"
	"yinjian/api/wire"
)

func peerCommand() *cobra.Command {
	c := group(&cobra.Command{Use: "peer", Short: "另一院区：结对、状态、解除 (the other campus: pair, status, remove)", Long: `两院区的设备结对：各出一张卡，交给对方；两人打电话核对指纹后各自接受。步骤见 docs/two-campuses.md。
Each campus makes a card and gives it to the other; two persons compare the fingerprint over the telephone; each side accepts the other's.`})
	c.AddCommand(peerCardCommand(), peerAddCommand(), peerRemoveCommand(), peerStatusCommand())
	return c
}

func peerCardCommand() *cobra.Command {
	var f adminFlags
	var out string
	c := &cobra.Command{Use: "card", Short: "写出本机的结对卡并显示指纹，每次一张新卡 (write this appliance's card, and show its fingerprint)", Args: exactArgs(0), RunE: func(c *cobra.Command, _ []string) error {
		a, err := f.client()
		if err != nil {
			return err
		}
		defer a.Close()
		card, err := a.PeerCard(c.Context())
		if err != nil {
			return explain(err)
		}
		if out == "" {
			out = f.beside("peer-card.json")
		}
		if err := os.WriteFile(out, card.File, 0o644); err != nil { // nothing in it is secret
			return err
		}
		if f.output == "json" {
			b, err := json.Marshal(map[string]string{"card": out, "fingerprint": card.Fingerprint})
			if err != nil {
				return err
			}
			return f.show(b)
		}
		fmt.Printf("结对卡 (card): %s\n指纹，念给对端院区 (fingerprint, to be read out to the other campus):\n\n    %s\n\n", out, card.Fingerprint)
		return nil
	}}
	f.add(c)
	c.Flags().StringVar(&out, "out", "", "写到哪里，缺省为设备目录下 peer-card.json (where to)")
	return c
}

func peerAddCommand() *cobra.Command {
	var req wire.AddPeer
	var card string
	return adminCommand("add", "接受对端院区的结对卡；指纹由对端在电话里念出 (accept the other campus's card; its fingerprint is read out over the telephone)", 0, func(c *cobra.Command) {
		required(c, &card, "card", "对端的结对卡文件 (the other campus's card)")
		required(c, &req.Fingerprint, "fingerprint", "电话中听到的指纹 (the fingerprint as it was heard)")
		required(c, &req.Reason, "reason", "理由 (why)")
		persons(c, &req.Persons)
	}, func(ctx context.Context, a *client.Admin, _ []string) (json.RawMessage, error) {
		err := checkPersons(a.LoggedIn(), req.Persons)
		if err != nil {
			return nil, err
		}
		if req.Card, err = os.ReadFile(card); err != nil {
			return nil, err
		}
		return a.AddPeer(ctx, req)
	})
}

func peerRemoveCommand() *cobra.Command {
	var req wire.RemovePeer
	return adminCommand("remove", "解除结对：不再采用对端的目录，不再互相见证 (end the pairing)", 0, func(c *cobra.Command) {
		required(c, &req.Reason, "reason", "理由 (why)")
		persons(c, &req.Persons)
	}, func(ctx context.Context, a *client.Admin, _ []string) (json.RawMessage, error) {
		if err := checkPersons(a.LoggedIn(), req.Persons); err != nil {
			return nil, err
		}
		return a.RemovePeer(ctx, req)
	})
}

// A peerReport is the answer about the state.
type peerReport struct {
	Listen string
	Paired bool
	Peer   struct {
		Node, Campus, Epoch, Address, Fingerprint, Since, Split, Accused, Heard string
		Up                                                                      bool
		AgeS                                                                    float64 `json:"age_s"`
		MaxS                                                                    float64 `json:"max_age_s"`
		Seen                                                                    uint64  `json:"seen_entries"`
		Given                                                                   uint64  `json:"cosigned_entries"`
		Gotten                                                                  uint64  `json:"confirmed_entries"`
		GotAt                                                                   string  `json:"confirmed_at"`
		Error                                                                   string  `json:"last_error"`
	}
	Warnings []string
}

func peerStatusCommand() *cobra.Command {
	return shown("status", "对端院区、链路、目录副本多旧、见证到哪里 (the other campus, the line, the copy's age, cosignatures)", nil,
		func(ctx context.Context, a *client.Admin) (json.RawMessage, error) { return a.PeerStatus(ctx) }, printPeerStatus)
}

func printPeerStatus(w io.Writer, r *peerReport) {
	if r.Listen == "" {
		fmt.Fprintln(w, "监听 listen:      关，未配置 listen.peer (off)")
	} else {
		fmt.Fprintf(w, "监听 listen:      %s\n", r.Listen)
	}
	if !r.Paired {
		fmt.Fprintln(w, "结对 pairing:     无 (none)")
		return
	}
	p := r.Peer
	link := "通 (up)"
	if !p.Up {
		link = "断 (down)"
		if p.Error != "" {
			link += "：" + p.Error
		}
	}
	fmt.Fprintf(w, "对端 peer:        %s（%s），%s，纪元 epoch %s\n", p.Node, p.Campus, p.Address, p.Epoch)
	fmt.Fprintf(w, "结对 since:       %s，指纹 fingerprint %s\n", p.Since, p.Fingerprint)
	fmt.Fprintf(w, "链路 line:        %s\n", link)
	if p.AgeS < 0 {
		fmt.Fprintln(w, "目录副本 copy:    多旧不明，时间不可信 (age unknown: time is not trusted)")
	} else {
		fmt.Fprintf(w, "目录副本 copy:    %s 之前为最新，超过 %s 即拒绝签名 (age, and the age at which signing is refused)\n", hours(int64(p.AgeS)), hours(int64(p.MaxS)))
	}
	fmt.Fprintf(w, "见证对端 given:   %d 条（见过 %d 条）(entries cosigned; seen)\n", p.Given, p.Seen)
	fmt.Fprintf(w, "对端见证 gotten:  %d 条，%s\n", p.Gotten, p.GotAt)
	for _, s := range r.Warnings {
		fmt.Fprintln(w, "！", s)
	}
}
