"""Which attention modules of transformers are known, and how they lie in memory: plain data.

One row a layout, as ``attention.projections`` reads it ("|" before another, for where the first
is not there), and what is between the factors beside
what can be seen in the module (``attention.py``); below it the types, "model.Class". A type is
here because a test read the same products off its own forward; another that looks like it is
left alone, and listed, until it is tested.
"""

ROTARY = "rotary embeddings between the factors turn queries and keys"
POSITIONS = "positions between the factors meet queries or keys alone"
COSINE = "queries and keys are normalized between the factors"
BIASES = "biases of its own between the factors"

Row = tuple[str, str, str]
"""The layout, what is between queries and keys, and what is between values and outputs."""

ROWS: dict[Row, str] = {
    ("q_proj k_proj v_proj o_proj", ROTARY, ""): """
        afmoe.AfmoeAttention apertus.ApertusAttention arcee.ArceeAttention aria.AriaTextAttention
        bamba.BambaAttention beam.BeamAttention bitnet.BitNetAttention blt.BltSelfAttention
        chameleon.ChameleonAttention cohere.CohereAttention cohere2.Cohere2Attention
        cohere2_moe.Cohere2MoeAttention cohere_compass.CohereCompassAttention
        cosmos3_edge.Cosmos3EdgeTextAttention csm.CsmAttention cwm.CwmAttention
        deepseek_ocr2.DeepseekOcr2TextAttention deepseek_ocr2.DeepseekOcr2VisionAttention
        dia.DiaSelfAttention dinov3_vit.DINOv3ViTAttention dots1.Dots1Attention emu3.Emu3Attention
        eomt_dinov3.EomtDinov3Attention ernie4_5.Ernie4_5Attention
        ernie4_5_moe.Ernie4_5_MoeAttention ernie4_5_vl_moe.Ernie4_5_VLMoeTextAttention
        eurobert.EuroBertAttention evolla.EvollaAttention exaone4.Exaone4Attention
        exaone_moe.ExaoneMoeAttention falcon_h1.FalconH1Attention flex_olmo.FlexOlmoAttention
        gemma.GemmaAttention gemma2.Gemma2Attention gemma3.Gemma3Attention glm.GlmAttention
        glm4.Glm4Attention glm4_moe.Glm4MoeAttention glm4v.Glm4vTextAttention
        glm4v_moe.Glm4vMoeTextAttention glm_image.GlmImageTextAttention
        glm_ocr.GlmOcrTextAttention glmasr.GlmAsrAttention gpt_oss.GptOssAttention
        gradium_phonon_tts.GradiumPhononTTSAttention granite.GraniteAttention
        granite4_vision.Granite4VisionTextAttention granite_docling.GraniteDoclingTextAttention
        granite_swa.GraniteSWAAttention granitemoe.GraniteMoeAttention
        granitemoe_swa.GraniteMoeSWAAttention granitemoehybrid.GraniteMoeHybridAttention
        granitemoeshared.GraniteMoeSharedAttention gte.GteAttention helium.HeliumAttention
        higgs_audio_v2.HiggsAudioV2Attention hrm_text.HrmTextAttention
        hunyuan_v1_dense.HunYuanDenseV1Attention hunyuan_v1_moe.HunYuanMoEV1Attention
        hunyuan_vl.HunYuanVLDenseV1Attention hy_v3.HYV3Attention hyperclovax.HyperCLOVAXAttention
        idefics.IdeficsAttention jais2.Jais2Attention jina_embeddings_v3.JinaEmbeddingsV3Attention
        kolibri1.Kolibri1Attention laguna.LagunaAttention lasr.LasrEncoderAttention
        lfm3.Lfm3Attention lightglue.LightGlueAttention llama.LlamaAttention
        llama4.Llama4TextAttention llama4.Llama4VisionAttention mellum.MellumAttention
        mimi.MimiAttention mimo_v2_flash.MiMoV2FlashAttention minimax.MiniMaxAttention
        minimax_m2.MiniMaxM2Attention minimax_m3_vl.MiniMaxM3VLAttention
        ministral.MinistralAttention ministral3.Ministral3Attention mistral.MistralAttention
        mixtral.MixtralAttention mllama.MllamaTextSelfAttention molmo2.Molmo2Attention
        muse_glimmer.MuseGlimmerTextAttention muse_spark.MuseSparkTextAttention
        nanochat.NanoChatAttention nemotron.NemotronAttention nomic_bert.NomicBertAttention
        olmo.OlmoAttention olmo2.Olmo2Attention olmo3.Olmo3Attention
        olmo_hybrid.OlmoHybridAttention olmoe.OlmoeAttention
        openai_privacy_filter.OpenAIPrivacyFilterAttention paddleocr_vl.PaddleOCRAttention
        pe_audio.PeAudioEncoderAttention pe_audio_video.PeAudioVideoEncoderAttention
        pe_video.PeVideoEncoderAttention phimoe.PhimoeAttention pixtral.PixtralAttention
        pocket_tts.PocketTTSAttention pocket_tts_audio_tokenizer.PocketTTSAudioTokenizerAttention
        qwen2.Qwen2Attention qwen2_5_omni.Qwen2_5OmniAttention qwen2_5_vl.Qwen2_5_VLAttention
        qwen2_moe.Qwen2MoeAttention qwen2_vl.Qwen2VLAttention qwen3.Qwen3Attention
        qwen3_moe.Qwen3MoeAttention qwen3_omni_moe.Qwen3OmniMoeCode2WavAttention
        qwen3_omni_moe.Qwen3OmniMoeTalkerCodePredictorAttention
        qwen3_omni_moe.Qwen3OmniMoeThinkerTextAttention qwen3_vl.Qwen3VLTextAttention
        qwen3_vl_moe.Qwen3VLMoeTextAttention recurrent_gemma.RecurrentGemmaAttention
        sam3.Sam3ViTRoPEAttention sapiens2.Sapiens2Attention seed_oss.SeedOssAttention
        smollm3.SmolLM3Attention solar_open.SolarOpenAttention starcoder2.Starcoder2Attention
        step3p7.Step3p7Attention t5gemma.T5GemmaSelfAttention t5gemma2.T5Gemma2SelfAttention
        ultrabert.UltrabertAttention vaultgemma.VaultGemmaAttention
        voxtral_realtime.VoxtralRealtimeAttention voxtral_realtime.VoxtralRealtimeTextAttention
    """,
    ("q_proj k_proj v_proj out_proj", "", ""): """
        aimv2.Aimv2Attention altclip.AltCLIPAttention audioflamingo3.AudioFlamingo3Attention
        bart.BartAttention bigbird_pegasus.BigBirdPegasusDecoderAttention biogpt.BioGptAttention
        blenderbot.BlenderbotAttention blenderbot_small.BlenderbotSmallAttention
        chinese_clip.ChineseCLIPVisionAttention clip.CLIPAttention clipseg.CLIPSegAttention
        cosmos3_edge.Cosmos3EdgeVisionAttention dab_detr.DetrAttention
        data2vec/data2vec_audio.Data2VecAudioAttention emu3.Emu3VQVAEAttentionBlock
        eomt.EomtAttention fsmt.Attention git.GitVisionAttention gpt_neo.GPTNeoSelfAttention
        granite_docling.GraniteDoclingVisionAttention groupvit.GroupViTAttention
        hubert.HubertAttention idefics2.Idefics2VisionAttention idefics3.Idefics3VisionAttention
        kosmos2.Kosmos2VisionAttention kosmos2.KosmosTextAttention
        kosmos2_5.Kosmos2_5TextAttention led.LEDDecoderAttention m2m_100.M2M100Attention
        marian.MarianAttention mask2former.Mask2FormerAttention mbart.MBartAttention
        metaclip_2.MetaClip2Attention minicpm_ocr.MiniCPMOcrVisionAttention
        minicpmv4_6.MiniCPMV4_6VisionAttention minicpmv4_7.MiniCPMV4_7VisionAttention
        moss_transcribe_diarize.MossTranscribeDiarizeAudioAttention musicgen.MusicgenAttention
        musicgen_melody.MusicgenMelodyAttention mvp.MvpAttention nllb_moe.NllbMoeAttention
        oneformer.OneFormerAttention opt.OPTAttention ovis2.Ovis2VisionAttention
        owlv2.Owlv2Attention owlvit.OwlViTAttention patchtsmixer.PatchTSMixerAttention
        patchtst.PatchTSTAttention pegasus.PegasusAttention pegasus_x.PegasusXAttention
        phi4_multimodal.Phi4MultimodalVisionAttention plbart.PLBartAttention
        pp_formulanet.PPFormulaNetAttention qwen2_5_omni.Qwen2_5OmniAudioAttention
        qwen2_audio.Qwen2AudioAttention qwen3_asr.Qwen3ASRAudioAttention
        qwen3_omni_moe.Qwen3OmniMoeAudioAttention sam.SamAttention
        sam3_lite_text.Sam3LiteTextTextAttention sam_hq.SamHQAttention
        seamless_m4t.SeamlessM4TAttention seamless_m4t_v2.SeamlessM4Tv2Attention sew.SEWAttention
        siglip.SiglipAttention siglip2.Siglip2Attention smolvlm.SmolVLMVisionAttention
        speech_to_text.Speech2TextAttention table_transformer.TableTransformerAttention
        tipsv2.Tipsv2TextAttention trocr.TrOCRAttention unispeech.UniSpeechAttention
        unispeech_sat.UniSpeechSatAttention unlimited_ocr.UnlimitedOcrAttention
        videomt.VideomtAttention vjepa2.VJEPA2PoolerSelfAttention voxtral.VoxtralAttention
        wav2vec2.Wav2Vec2Attention whisper.WhisperAttention x_clip.XCLIPAttention
        xglm.XGLMAttention
    """,
    ("q_proj k_proj v_proj o_proj", "", ""): """
        audio_spectrogram_transformer.ASTAttention beit.BeitAttention blt.BltCrossAttention
        canary.CanaryCrossAttention canary.CanarySelfAttention cohere_asr.CohereAsrCrossAttention
        cohere_asr.CohereAsrSelfAttention conditional_detr.ConditionalDetrSelfAttention
        d_fine.DFineSelfAttention deformable_detr.DeformableDetrSelfAttention
        deimv2.Deimv2SelfAttention deit.DeiTAttention detr.DetrCrossAttention
        detr.DetrSelfAttention dinov2.Dinov2Attention
        dinov2_with_registers.Dinov2WithRegistersAttention edgetam.EdgeTamAttention
        edgetam_video.EdgeTamVideoAttention flint.FlintAttention fun_asr_nano.FunAsrNanoAttention
        ijepa.IJepaAttention jamba.JambaAttention lw_detr.LwDetrAttention
        lw_detr.LwDetrViTAttention maskformer.MaskFormerDetrCrossAttention
        maskformer.MaskFormerDetrSelfAttention mllama.MllamaTextCrossAttention
        mllama.MllamaVisionAttention molmo2.Molmo2VisionAttention
        moonshine_streaming.MoonshineStreamingEncoderAttention nemotron_h.NemotronHAttention
        pixio.PixioAttention pp_doclayout_v2.PPDocLayoutV2SelfAttention
        pp_doclayout_v3.PPDocLayoutV3SelfAttention pp_doclayout_v4.PPDocLayoutV4SelfAttention
        radio.RadioAttention rf_detr.RfDetrAttention rf_detr.RfDetrDinov2Attention
        rt_detr.RTDetrSelfAttention rt_detr_v2.RTDetrV2SelfAttention sam2.Sam2Attention
        sam2_video.Sam2VideoAttention sam3.Sam3Attention sam3_lite_text.Sam3LiteTextAttention
        sam3_tracker.Sam3TrackerAttention sam3_tracker_video.Sam3TrackerVideoAttention
        swin.SwinAttention tipsv2.Tipsv2VisionAttention videoprism.VideoPrismAttention
        vit.ViTAttention vit_mae.ViTMAEAttention vit_msn.ViTMSNAttention vivit.VivitAttention
        zamba.ZambaAttention
    """,
    ("self.query self.key self.value output.dense", "", ""): """
        align.AlignTextAttention altclip.AltRobertaAttention bert.BertAttention
        bert_generation.BertGenerationAttention big_bird.BigBirdAttention
        blip/blip_text.BlipTextAttention bridgetower.BridgeTowerAttention
        camembert.CamembertAttention canine.CanineAttention chinese_clip.ChineseCLIPTextAttention
        clap.ClapAudioAttention clap.ClapTextAttention
        data2vec/data2vec_text.Data2VecTextAttention donut/donut_swin.DonutSwinAttention
        electra.ElectraAttention ernie.ErnieAttention git.GitAttention layoutlm.LayoutLMAttention
        lxmert.LxmertSelfAttentionLayer markuplm.MarkupLMAttention
        maskformer/maskformer_swin.MaskFormerSwinAttention megatron_bert.MegatronBertAttention
        nystromformer.NystromformerAttention pp_doclayout_v2.PPDocLayoutV2ReadingOrderAttention
        rembert.RemBertAttention roberta.RobertaAttention
        roberta_prelayernorm.RobertaPreLayerNormAttention roc_bert.RoCBertAttention
        splinter.SplinterAttention superglue.SuperGlueAttention tapas.TapasAttention
        visual_bert.VisualBertAttention xlm_roberta.XLMRobertaAttention
        xlm_roberta_xl.XLMRobertaXLAttention xmod.XmodAttention
    """,
    ("qkv:qkv proj", ROTARY, ""): """
        cohere_compass.CohereCompassVisionAttention dots3_note.Dots3NoteVisionAttention
        ernie4_5_vl_moe.Ernie4_5_VLMoeVisionAttention exaone4_5.Exaone4_5_VisionAttention
        glm4v.Glm4vVisionAttention glm4v_moe.Glm4vMoeVisionAttention
        glm5_next.Glm5NextVisionAttention glm_ocr.GlmOcrVisionAttention
        qwen2_5_vl.Qwen2_5_VLVisionAttention qwen2_vl.VisionAttention
        qwen3_5.Qwen3_5VisionAttention qwen3_5_moe.Qwen3_5MoeVisionAttention
        qwen3_omni_moe.Qwen3OmniMoeVisionAttention qwen3_vl.Qwen3VLVisionAttention
        qwen3_vl_moe.Qwen3VLMoeVisionAttention qwen4_exp.Qwen4ExpVisionAttention
    """,
    ("qkv:qkv proj", "", ""): """
        deepseek_ocr2.DeepseekOcr2SamVisionAttention
        deepseek_ocr2.DeepseekOcr2SamVisionSdpaAttention glm_image.GlmImageVisionAttention
        got_ocr2.GotOcr2VisionAttention mgp_str.MgpstrAttention
        pp_formulanet.PPFormulaNetVisionAttention sam.SamVisionAttention
        sam.SamVisionSdpaAttention sam_hq.SamHQVisionAttention sam_hq.SamHQVisionSdpaAttention
        seggpt.SegGptAttention slanext.SLANeXtVisionAttention
        unlimited_ocr.UnlimitedOcrSamVisionAttention
        unlimited_ocr.UnlimitedOcrSamVisionSdpaAttention vitdet.VitDetAttention
    """,
    ("attention.query attention.key attention.value output.dense", "", ""): """
        blip_2.Blip2QFormerAttention data2vec/data2vec_vision.Data2VecVisionAttention
        dpt.DPTViTAttention flava.FlavaAttention instructblip.InstructBlipQFormerAttention
        instructblipvideo.InstructBlipVideoQFormerAttention mobilevit.MobileViTAttention
        videomae.VideoMAEAttention vilt.ViltAttention vitpose_backbone.VitPoseBackboneAttention
        yolos.YolosAttention
    """,
    ("q_proj k_proj v_proj out_proj", ROTARY, ""): """
        gptj.GPTJAttention inkling2.Inkling2VisionAttention lfm2.Lfm2Attention
        lfm2_moe.Lfm2MoeAttention lfm3_vl.Lfm3VlVisionAttention
        minimax_m3_vl.MiniMaxM3VLVisionAttention paddleocr_vl.PaddleOCRVisionAttention
        step3p7.Step3p7VisionAttention video_llama_3.VideoLlama3VisionAttention
    """,
    ("q k v o", "", ""): """
        longt5.LongT5Attention mt5.MT5Attention pop2piano.Pop2PianoAttention
        switch_transformers.SwitchTransformersAttention t5.T5Attention udop.UdopAttention
        umt5.UMT5Attention
    """,
    ("qkv:qkv projection", "", ""): """
        blip.BlipAttention blip_2.Blip2Attention instructblip.InstructBlipAttention
        instructblipvideo.InstructBlipVideoAttention pp_ocrv5_mobile_rec.PPOCRV5MobileRecAttention
        pp_ocrv5_server_rec.PPOCRV5ServerRecAttention pp_ocrv6_small_rec.PPOCRV6SmallRecAttention
    """,
    ("query_key_value:(qkv) dense", ROTARY, ""): """
        falcon.FalconAttention gpt_neox.GPTNeoXAttention
        gpt_neox_japanese.GPTNeoXJapaneseAttention persimmon.PersimmonAttention
    """,
    ("q_attn.T c_attn.T:kv c_proj.T | c_attn.T:qkv c_proj.T", "", ""): """
        decision_transformer.DecisionTransformerGPT2Attention gpt2.GPT2Attention
        imagegpt.ImageGPTAttention
    """,
    ("q_lin k_lin v_lin out_lin", "", ""): """
        distilbert.DistilBertSelfAttention flaubert.MultiHeadAttention xlm.MultiHeadAttention
    """,
    ("q_proj k_proj v_proj proj", ROTARY, ""): """
        kimi_k25.Kimi_K25VisionAttention muse_glimmer.MuseGlimmerVisionAttention
        muse_spark.MuseSparkVisionAttention
    """,
    ("q_proj k_proj v_proj projection_layer", "", ""): """
        internvl.InternVLVisionAttention janus.JanusVisionAttention
        qianfan_ocr.QianfanOCRVisionAttention
    """,
    ("self.query self.key self.value output.dense", ROTARY, ""): """
        esm.EsmAttention evolla.EvollaSaProtAttention roformer.RoFormerAttention
    """,
    ("linear_q linear_k linear_v linear_out", "", ""): """
        seamless_m4t_v2.SeamlessM4Tv2ConformerSelfAttention
        wav2vec2_bert.Wav2Vec2BertSelfAttention
    """,
    ("linear_q linear_k linear_v linear_out", POSITIONS, ""): """
        seamless_m4t.SeamlessM4TConformerSelfAttention
        wav2vec2_conformer.Wav2Vec2ConformerSelfAttention
    """,
    ("q_proj k_proj v_proj o_proj", POSITIONS, ""): """
        nemotron_asr_streaming.NemotronAsrStreamingEncoderAttention
        parakeet.ParakeetEncoderAttention
    """,
    ("q_proj.linear k_proj.linear v_proj.linear o_proj.linear", ROTARY, ""): """
        kyutai_speech_to_text.KyutaiSpeechToTextAttention moshi.MoshiAttention
    """,
    ("qkv_proj:qkv o_proj", ROTARY, ""): """
        phi3.Phi3Attention phi4_multimodal.Phi4MultimodalAttention
    """,
    ("query key value dense", "", ""): """
        albert.AlbertAttention tvp.TvpAttention
    """,
    ("query key value out_proj", "", ""): """
        omdet_turbo.OmDetTurboMultiheadAttention zoedepth.ZoeDepthMultiheadAttention
    """,
    ("query key value output", "", ""): """
        kosmos2_5.Kosmos2_5VisionAttention pix2struct.Pix2StructVisionAttention
    """,
    ("self.query self.key self.value output.dense", COSINE, ""): """
        swin2sr.Swin2SRAttention swinv2.Swinv2Attention
    """,
    ("Wq Wk Wv dense", "", ""): """
        ctrl.MultiHeadAttention
    """,
    ("Wqkv:qkv Wo", ROTARY, ""): """
        modernbert.ModernBertAttention
    """,
    ("Wqkv:qkv out_proj", "", ""): """
        mpt.MptAttention
    """,
    ("att_proj:qkv out_proj", "", ""): """
        bark.BarkSelfAttention
    """,
    ("attention.q_proj attention.k_proj attention.v_proj attention.out_proj", "", ""): """
        gpt_neo.GPTNeoAttention
    """,
    ("attention.qkv:qkv output.dense", "", ""): """
        timesformer.TimeSformerAttention
    """,
    ("attn.q attn.k attn.v attn.o", "", ""): """
        mpnet.MPNetAttention
    """,
    ("c_attn:(qkv) c_proj", "", ""): """
        gpt_bigcode.GPTBigCodeAttention
    """,
    ("project_q project_k project_v attention_out", "", ""): """
        cpmant.CpmAntAttention
    """,
    ("q k v proj", ROTARY, ""): """
        qwen2_5_omni.Qwen2_5OmniVisionAttention
    """,
    ("q_proj k_proj v_proj Wo", ROTARY, ""): """
        modernbert_decoder.ModernBertDecoderAttention
    """,
    ("q_proj k_proj v_proj dense", ROTARY, ""): """
        phi.PhiAttention
    """,
    ("q_proj k_proj v_proj out_proj", POSITIONS, ""): """
        speecht5.SpeechT5Attention
    """,
    ("q_proj k_proj v_proj out_proj", ROTARY, ROTARY): """
        clvp.ClvpSelfAttention
    """,
    ("q_proj k_proj v_proj proj", "", ""): """
        oneformer.OneFormerTextMapperAttention
    """,
    ("query_key_value:(qkv) dense", "", ""): """
        bloom.BloomAttention
    """,
    ("query_proj key_proj value_proj out_proj", "", ""): """
        prophetnet.ProphetNetAttention
    """,
    ("self.in_proj:(qkv) output.dense", POSITIONS, BIASES): """
        deberta.DebertaAttention
    """,
    ("self.query self.key self.value output", "", ""): """
        bigbird_pegasus.BigBirdPegasusEncoderAttention
    """,
    ("self.query_proj self.key_proj self.value_proj output.dense", "", ""): """
        deberta_v2.DebertaV2Attention
    """,
}


def qualified(name: str) -> str:
    """The full name of "model.Class", or of "model/file.Class" in another of a model's files."""
    path, _, kind = name.rpartition(".")
    model, _, file = path.partition("/")
    return f"transformers.models.{model}.modeling_{file or model}.{kind}"


FAMILIES: dict[str, Row] = {
    qualified(name): row for row, names in ROWS.items() for name in names.split()
}
"""Full name of a type -> its row."""
