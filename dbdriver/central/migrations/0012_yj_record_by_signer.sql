-- review: central-0012
-- makes: index yj_record_by_signer
CREATE INDEX yj_record_by_signer ON yj_record (signer_id, signed_at_us)
