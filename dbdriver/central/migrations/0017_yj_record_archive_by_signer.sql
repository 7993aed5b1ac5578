-- review: central-0017
-- makes: index yj_record_archive_by_signer
CREATE INDEX yj_record_archive_by_signer ON yj_record_archive (signer_id, signed_at_us)
