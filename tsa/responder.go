package tsa

import (
	"context"
	"errors"
	"fmt"

	"github.com/sirupsen/logrus"
)

// An Issuer makes tokens. [*Authority] is one; another may have them made in another process.
type Issuer interface {
	// Issue is as [Authority.Issue].
	Issue(ctx context.Context, req *Request) (*Token, error)
}

// A Responder answers requests with an issuer's tokens, each recorded. Safe for concurrent use.
type Responder struct {
	Issuer   Issuer
	Recorder Recorder // nil: nothing is answered but refusals
	// Discarded, if set, is given a token that could not be recorded, and why. It must not block.
	Discarded func(reason error, tokens ...[]byte)
	Log       logrus.FieldLogger // names the unit
}

// Respond answers a DER TimeStampReq with a DER TimeStampResp, always: granted, or a rejection with its PKIFailureInfo.
// A token leaves only after it is recorded. What goes wrong inside is logged and shown as systemFailure, no more.
func (r *Responder) Respond(ctx context.Context, reqDER []byte) []byte {
	token, err := r.respond(ctx, reqDER)
	var fault *RequestError
	switch {
	case err == nil:
		if token.response != nil {
			return token.response
		}
		response, _ := encodeGranted(len(token.DER), func(b []byte) []byte { return append(b, token.DER...) })
		return response
	case errors.As(err, &fault):
		r.Log.WithError(err).Debug("timestamp request refused")
		return encodeRejection(fault.Failure, fault.Detail)
	case errors.Is(err, ErrTimeNotAvailable):
		r.Log.WithError(err).Warn("timestamp refused: time not available")
		return encodeRejection(TimeNotAvailable, "trusted time is not available")
	}
	r.Log.WithError(err).Error("timestamp failed")
	return encodeRejection(SystemFailure, "the authority cannot serve the request now")
}

func (r *Responder) respond(ctx context.Context, reqDER []byte) (*Token, error) {
	req, err := ParseRequest(reqDER)
	if err != nil {
		return nil, err
	}
	if r.Recorder == nil {
		return nil, errors.New("tsa: unit has no recorder")
	}
	token, err := r.Issuer.Issue(ctx, req)
	if err != nil {
		return nil, err
	}
	if err := r.Recorder.RecordToken(ctx, token); err != nil {
		if r.Discarded != nil {
			r.Discarded(err, token.DER)
		}
		return nil, fmt.Errorf("tsa: recording token %x: %w", token.Serial, err)
	}
	return token, nil
}
