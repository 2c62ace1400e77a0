"""Models over sequences of item vectors: SASRec, gSASRec, BERT4Rec, any transformer."""
